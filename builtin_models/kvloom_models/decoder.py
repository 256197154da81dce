"""What every decoder has around its layers: embedding, rotary tables, last norm, output head, pipeline slices, weight names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor, nn

from kvloom.errors import ConfigError, InternalError
from kvloom.interfaces.model import BuildContext, ForwardContext, Model, ModelInputs, ModelOutputs, ModuleTarget
from kvloom.interfaces.state import LayerStateSpec
from kvloom.layers import Embedding, LMHead, RMSNorm, Rotary, Rotation, attention_state
from kvloom_models.config import DecoderConfig

BASE_NAMES = ("layers.", "embed_tokens.", "norm.")
"""What tensors of the base model begin with where ``model.`` is left out."""


class DecoderLayer(nn.Module):
    """One layer of a `CausalLM`. Made with ``(config, build, index)``; its weights lie under ``model.layers.{index}``."""

    @abstractmethod
    def __init__(self, config: DecoderConfig, build: BuildContext, index: int) -> None:
        super().__init__()
        self.index = index
        self.prefix = f"model.layers.{index}"

    @abstractmethod
    def forward(self, x: Tensor, residual: Tensor | None, rotation: Rotation, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """``x [T, H]`` is not yet added to ``residual [T, H]`` (None before the first layer); nor is what is returned."""

    @abstractmethod
    def module_map(self) -> dict[str, ModuleTarget]:
        """See `Model.module_map`."""


class CausalLM(nn.Module, Model):
    """Embedding -> layers -> norm -> logits. A family names its `layer_class`.

    Raises:
        ConfigError: the model cannot be divided as the configuration asks.
    """

    layer_class: ClassVar[type[DecoderLayer]]
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    row_invariant = True

    def __init__(self, config: DecoderConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self._build = build
        self._stage = stage_layers(config.num_hidden_layers, build.pipeline_rank, build.pipeline_size)
        self.is_first = build.pipeline_rank == 0
        self.is_last = build.pipeline_rank == build.pipeline_size - 1
        generates = build.task == "generate"
        tied = config.tie_word_embeddings and generates
        if config.tie_word_embeddings or not generates:
            self.ignored = (*self.ignored, "lm_head.*")
        self.embed_tokens: Embedding | None = None
        self.norm: RMSNorm | None = None
        self.lm_head: LMHead | None = None
        if self.is_first or (self.is_last and tied):
            self.embed_tokens = Embedding(build, "model.embed_tokens", config.vocab_size, config.hidden_size,
                                          is_head=tied and self.is_last)
        self.rotary = Rotary(build, config.rope, config.head_dim, config.max_position_embeddings)
        self.layers = nn.ModuleList(self.layer_class(config, build, i) for i in self._stage)
        if self.is_last:
            self.norm = RMSNorm(build, "model.norm", config.hidden_size, config.rms_norm_eps)
        if self.is_last and generates and not tied:
            self.lm_head = LMHead(build, "lm_head", config.vocab_size, config.hidden_size)

    def forward(self, inputs: ModelInputs, ctx: ForwardContext) -> ModelOutputs:
        """See `Model.forward`. Between stages travels the residual stream, everything added up."""
        x = self._embed(inputs, ctx) if inputs.hidden is None else inputs.hidden  # [T, H]
        rotation = self.rotary(inputs.positions[0])
        residual: Tensor | None = None
        auxiliary: dict[int, Tensor] = {}
        for layer in self._decoder_layers():
            x, residual = layer(x, residual, rotation, ctx)  # [T, H] each
            if layer.index in ctx.auxiliary_layers:
                auxiliary[layer.index] = residual + x
        if self.norm is not None:
            x, _ = self.norm.add(x, residual)
        elif residual is not None:
            x = residual + x
        return ModelOutputs(x, auxiliary)

    def _decoder_layers(self) -> Iterator[DecoderLayer]:
        """`layers`, typed."""
        return (layer for layer in self.layers if isinstance(layer, DecoderLayer))

    def _embed(self, inputs: ModelInputs, ctx: ForwardContext) -> Tensor:
        """``token_ids [T] -> [T, H]``, rows that are given as embeddings replaced."""
        if self.embed_tokens is None:
            raise InternalError("only the first pipeline stage embeds tokens")
        x: Tensor = self.embed_tokens(inputs.token_ids, ctx)
        if inputs.embeds is None:
            return x
        rows, values = inputs.embeds
        return x.index_copy(0, rows, values.to(x))

    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """See `Model.logits`: ``[R, H] -> [R, V]`` in the model's dtype."""
        head = self.lm_head if self.lm_head is not None else self.embed_tokens
        if head is None or self._build.task != "generate":
            raise InternalError("only the last pipeline stage of a model that generates has logits")
        return head.logits(hidden, ctx)

    def state_specs(self) -> list[LayerStateSpec]:
        """See `Model.state_specs`."""
        c = self.config
        return [attention_state(self._build, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
                                window_tokens=c.window_tokens(i)) for i in range(c.num_hidden_layers)]

    def module_map(self) -> Mapping[str, ModuleTarget]:
        """See `Model.module_map`."""
        around = {"model.embed_tokens": self.embed_tokens, "model.norm": self.norm, "lm_head": self.lm_head}
        targets = {prefix: ModuleTarget(layer) for prefix, layer in around.items() if layer is not None}
        for layer in self._decoder_layers():
            targets |= layer.module_map()
        return targets

    def tensor_name(self, name: str) -> str:
        """See `Model.tensor_name`: checkpoints of the base model alone, and exports of sentence-transformers, leave ``model.`` out."""
        return f"model.{name}" if name.startswith(BASE_NAMES) else name

    def other_stage_prefixes(self) -> tuple[str, ...]:
        """See `Model.other_stage_prefixes`."""
        elsewhere = [f"model.layers.{i}" for i in range(self.config.num_hidden_layers) if i not in self._stage]
        if self.embed_tokens is None:
            elsewhere.append("model.embed_tokens")
        if not self.is_last:
            elsewhere += ["model.norm", "lm_head"]
        return tuple(elsewhere)


def stage_layers(num_layers: int, rank: int, size: int) -> range:
    """Indices of one pipeline stage's layers; stages differ by at most one. Raises `ConfigError` for more stages than layers."""
    if size > num_layers:
        raise ConfigError(f"pipeline_parallel_size {size} is more than the model's {num_layers} layers")
    return range(num_layers * rank // size, num_layers * (rank + 1) // size)
