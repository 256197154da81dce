"""What every encoder has around its layers: word embeddings, state, label head, weight names. And the layer of BERT and its kin.

Shapes: T tokens of this step, H hidden size, I intermediate size, D head dimension. Rows of a step are whole sequences: nothing is kept
between steps, and every token sees the others of its own sequence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from kvloom.errors import ConfigError, InternalError, UnsupportedFeatureError
from kvloom.interfaces.model import BuildContext, ForwardContext, Model, ModelInputs, ModelOutputs, ModuleTarget
from kvloom.interfaces.state import LayerStateSpec, StateKind
from kvloom.layers import ColumnLinear, Embedding, LayerNorm, LoadableModule, QKVLinear, RowLinear, TokenAttention, activation
from kvloom_models.encoder_config import EncoderConfig


class LabelHead(nn.Module):
    """Pooled hidden states to one score a label. Made with ``(config, build)``."""

    @abstractmethod
    def forward(self, pooled: Tensor, ctx: ForwardContext) -> Tensor:
        """``[R, H] -> [R, labels]``, no activation."""


class Encoder(nn.Module, Model):
    """Embeddings -> layers -> hidden states ``[T, H]``, and scores of labels where a class names a `head_class`.

    Names are those of the base model's own checkpoints; others put `base_prefix` before them.

    Raises:
        ConfigError: more than one pipeline stage.
    """

    chunkable = False
    tasks: tuple[str, ...] = ("embed",)
    pooling = "CLS"
    base_prefix: ClassVar[str]
    head_class: ClassVar[type[LabelHead] | None] = None
    renamed: ClassVar[Mapping[str, str]] = {}
    """Last part of a tensor's name in old checkpoints -> now."""

    def __init__(self, config: EncoderConfig, build: BuildContext) -> None:
        super().__init__()
        if build.pipeline_size > 1:
            raise ConfigError("encoders are not divided into pipeline stages; set pipeline_parallel_size=1")
        self.head: LabelHead | None = None
        if self.head_class is not None:
            self.head = self.head_class(config, build)
        self.tasks = self.tasks_of(config)
        self._num_layers = config.num_hidden_layers

    @classmethod
    def tasks_of(cls, config: EncoderConfig) -> tuple[str, ...]:
        """See `Model.tasks_of`: with one label it is a cross-encoder."""
        if cls.head_class is None:
            return cls.tasks
        return ("score", "classify") if config.num_labels == 1 else ("classify",)

    @abstractmethod
    def embed(self, inputs: ModelInputs, ctx: ForwardContext) -> Tensor:
        """``token_ids [T] -> [T, H]``, what the first layer gets."""

    @abstractmethod
    def run_layers(self, x: Tensor, inputs: ModelInputs, ctx: ForwardContext) -> ModelOutputs:
        """``x [T, H]`` through all layers."""

    def forward(self, inputs: ModelInputs, ctx: ForwardContext) -> ModelOutputs:
        """See `Model.forward`."""
        return self.run_layers(self.embed(inputs, ctx), inputs, ctx)

    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """Raises `UnsupportedFeatureError`: an encoder does not continue a text."""
        raise UnsupportedFeatureError("generate", type(self).__name__, f"this model does {', '.join(self.tasks)}")

    def classify(self, pooled: Tensor, ctx: ForwardContext) -> Tensor:
        """See `Model.classify`."""
        if self.head is None:
            return super().classify(pooled, ctx)
        scores: Tensor = self.head(pooled, ctx)
        return scores

    def state_specs(self) -> list[LayerStateSpec]:
        """See `Model.state_specs`: no layer keeps anything."""
        return [LayerStateSpec(StateKind.NONE)] * self._num_layers

    def tensor_name(self, name: str) -> str:
        """See `Model.tensor_name`."""
        name = name.removeprefix(f"{self.base_prefix}.")
        module, _, suffix = name.rpartition(".")
        return f"{module}.{self.renamed[suffix]}" if suffix in self.renamed else name

    def module_map(self) -> Mapping[str, ModuleTarget]:
        """See `Model.module_map`: layers lie under the prefix they were made with, fused ones are listed by `fused_targets`."""
        fused = self.fused_targets()
        inside = {id(target.layer) for target in fused.values()} | {id(layer) for layer in self.fused_layers()}
        plain = {m.prefix: ModuleTarget(m) for m in self.modules() if isinstance(m, LoadableModule) and id(m) not in inside}
        return plain | fused

    @abstractmethod
    def fused_layers(self) -> Iterator[LoadableModule]:
        """Layers with several shards."""

    @abstractmethod
    def fused_targets(self) -> dict[str, ModuleTarget]:
        """Where their tensors go."""


class LayerNames(NamedTuple):
    """Checkpoint module names of a `PostNormLayer`'s parts, each after the layer's own prefix."""

    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    up: str
    down: str
    output_norm: str


class PostNormLayer(nn.Module):
    """Attention, then MLP; each is added to what it was given, and the sum is normalised (Vaswani et al., 2017)."""

    def __init__(self, config: EncoderConfig, build: BuildContext, index: int, prefix: str, names: LayerNames) -> None:
        super().__init__()
        hidden, inner, heads, head_dim = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim
        at = LayerNames(*(f"{prefix}.{name}" for name in names))
        self.index, self._names = index, at
        self.qkv = QKVLinear(build, at.query, hidden, heads, heads, head_dim, bias=True)
        self.attend = TokenAttention(build, index, heads, heads, head_dim)
        self.output = RowLinear(build, at.output, heads * head_dim, hidden, bias=True)
        self.attention_norm = LayerNorm(build, at.attention_norm, hidden, config.layer_norm_eps)
        self.up = ColumnLinear(build, at.up, hidden, inner, bias=True)
        self.act = activation(config.hidden_act)
        self.down = RowLinear(build, at.down, inner, hidden, bias=True)
        self.output_norm = LayerNorm(build, at.output_norm, hidden, config.layer_norm_eps)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """``[T, H] -> [T, H]``."""
        q, k, v = self.qkv(x, ctx)  # [T, heads, D] each
        x = self.attention_norm(x + self.output(self.attend(q, k, v, None, ctx), ctx))
        y: Tensor = self.output_norm(x + self.down(self.act(self.up(x, ctx)), ctx))
        return y

    def fused_targets(self) -> dict[str, ModuleTarget]:
        """Of query, key and value."""
        at = self._names
        return {prefix: ModuleTarget(self.qkv, shard) for prefix, shard in ((at.query, "q"), (at.key, "k"), (at.value, "v"))}


class PostNormEncoder(Encoder):
    """Embeddings by token, position and maybe type, one norm, `PostNormLayer`s. A family names its layers."""

    layers_prefix: ClassVar[str]
    layer_names: ClassVar[LayerNames]
    ignored: tuple[str, ...] = ("embeddings.position_ids", "embeddings.token_type_ids")

    def __init__(self, config: EncoderConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.config = config
        hidden = config.hidden_size
        self.words = Embedding(build, "embeddings.word_embeddings", config.vocab_size, hidden)
        self.positions = Embedding(build, "embeddings.position_embeddings", config.max_position_embeddings, hidden)
        self.norm = LayerNorm(build, "embeddings.LayerNorm", hidden, config.layer_norm_eps)
        self.layers = nn.ModuleList(PostNormLayer(config, build, i, f"{self.layers_prefix}.{i}", self.layer_names)
                                    for i in range(config.num_hidden_layers))

    def embed(self, inputs: ModelInputs, ctx: ForwardContext) -> Tensor:
        """See `Encoder.embed`."""
        if inputs.embeds is not None:
            raise InternalError("embeddings were given to an encoder that takes token ids")
        x: Tensor = self.norm(self.words(inputs.token_ids, ctx) + self.positions(self.places(inputs), ctx))
        return x

    def places(self, inputs: ModelInputs) -> Tensor:
        """Rows of the position table, ``[T]``."""
        return inputs.positions[0]

    def run_layers(self, x: Tensor, inputs: ModelInputs, ctx: ForwardContext) -> ModelOutputs:
        """See `Encoder.run_layers`."""
        auxiliary: dict[int, Tensor] = {}
        for layer in self._typed_layers():
            x = layer(x, ctx)
            if layer.index in ctx.auxiliary_layers:
                auxiliary[layer.index] = x
        return ModelOutputs(x, auxiliary)

    def _typed_layers(self) -> Iterator[PostNormLayer]:
        return (layer for layer in self.layers if isinstance(layer, PostNormLayer))

    def fused_layers(self) -> Iterator[LoadableModule]:
        """See `Encoder`."""
        return (layer.qkv for layer in self._typed_layers())

    def fused_targets(self) -> dict[str, ModuleTarget]:
        """See `Encoder`."""
        return {prefix: target for layer in self._typed_layers() for prefix, target in layer.fused_targets().items()}
