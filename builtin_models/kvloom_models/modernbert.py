"""ModernBERT (Warner et al., 2024): rotary embeddings, norms before the parts, a gated MLP, windows in most layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from kvloom.errors import InternalError
from kvloom.interfaces.model import BuildContext, ForwardContext, ModelInputs, ModelOutputs, ModuleTarget
from kvloom.layers import (
    Embedding,
    FusedShards,
    GateUpLinear,
    LayerNorm,
    Linear,
    LoadableModule,
    QKVLinear,
    Rotary,
    Rotation,
    RowLinear,
    TokenAttention,
    activation,
    gated,
)
from kvloom_models.encoder import Encoder, LabelHead
from kvloom_models.encoder_config import ModernBertConfig


def _norm(config: ModernBertConfig, build: BuildContext, prefix: str) -> LayerNorm:
    return LayerNorm(build, prefix, config.hidden_size, config.norm_eps, bias=config.norm_bias)


class ModernBertLayer(nn.Module):
    """Attention and MLP, each behind a norm, each added to the residual stream. The first layer's input is normalised already."""

    def __init__(self, config: ModernBertConfig, build: BuildContext, index: int) -> None:
        super().__init__()
        prefix, hidden, inner = f"layers.{index}", config.hidden_size, config.intermediate_size
        heads, head_dim = config.num_attention_heads, config.head_dim
        self.index, self.prefix, self.kind = index, prefix, config.layer_type(index)
        self.attn_norm = _norm(config, build, f"{prefix}.attn_norm") if index else None
        self.qkv = QKVLinear(build, f"{prefix}.attn.Wqkv", hidden, heads, heads, head_dim, bias=config.attention_bias)
        self.attend = TokenAttention(build, index, heads, heads, head_dim, window_tokens=config.window_tokens(index))
        self.output = RowLinear(build, f"{prefix}.attn.Wo", hidden, hidden, bias=config.attention_bias)
        self.mlp_norm = _norm(config, build, f"{prefix}.mlp_norm")
        self.gate_up = GateUpLinear(build, f"{prefix}.mlp.Wi", hidden, inner, bias=config.mlp_bias)
        self.act = activation(config.hidden_act)
        self.down = RowLinear(build, f"{prefix}.mlp.Wo", inner, hidden, bias=config.mlp_bias)
        self.fused_targets = {f"{prefix}.attn.Wqkv": ModuleTarget(FusedShards(self.qkv, ("q", "k", "v"))),
                              f"{prefix}.mlp.Wi": ModuleTarget(FusedShards(self.gate_up, ("gate", "up")))}

    def forward(self, x: Tensor, rotations: Mapping[str, Rotation], ctx: ForwardContext) -> Tensor:
        """``[T, H] -> [T, H]``."""
        q, k, v = self.qkv(x if self.attn_norm is None else self.attn_norm(x), ctx)  # [T, heads, D] each
        x = x + self.output(self.attend(q, k, v, rotations[self.kind], ctx), ctx)
        y: Tensor = x + self.down(gated(self.act, self.gate_up(self.mlp_norm(x), ctx)), ctx)
        return y


class ModernBertModel(Encoder):
    """Hidden states after the last norm."""

    base_prefix = "model"

    def __init__(self, config: ModernBertConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.words = Embedding(build, "embeddings.tok_embeddings", config.vocab_size, config.hidden_size)
        self.norm = _norm(config, build, "embeddings.norm")
        self.layers = nn.ModuleList(ModernBertLayer(config, build, i) for i in range(config.num_hidden_layers))
        self.rotaries = nn.ModuleDict({kind: Rotary(build, config.ropes[kind], config.head_dim, config.max_position_embeddings)
                                       for kind in sorted({layer.kind for layer in self._typed_layers()})})
        self.final_norm = _norm(config, build, "final_norm")

    def embed(self, inputs: ModelInputs, ctx: ForwardContext) -> Tensor:
        """See `Encoder.embed`."""
        if inputs.embeds is not None:
            raise InternalError("embeddings were given to an encoder that takes token ids")
        x: Tensor = self.norm(self.words(inputs.token_ids, ctx))
        return x

    def run_layers(self, x: Tensor, inputs: ModelInputs, ctx: ForwardContext) -> ModelOutputs:
        """See `Encoder.run_layers`."""
        rotations = {kind: rotary(inputs.positions[0]) for kind, rotary in self.rotaries.items()}
        auxiliary: dict[int, Tensor] = {}
        for layer in self._typed_layers():
            x = layer(x, rotations, ctx)
            if layer.index in ctx.auxiliary_layers:
                auxiliary[layer.index] = x
        return ModelOutputs(self.final_norm(x), auxiliary)

    def _typed_layers(self) -> Iterator[ModernBertLayer]:
        return (layer for layer in self.layers if isinstance(layer, ModernBertLayer))

    def fused_layers(self) -> Iterator[LoadableModule]:
        """See `Encoder`."""
        return (part for layer in self._typed_layers() for part in (layer.qkv, layer.gate_up))

    def fused_targets(self) -> dict[str, ModuleTarget]:
        """See `Encoder`."""
        return {prefix: target for layer in self._typed_layers() for prefix, target in layer.fused_targets.items()}


class ModernBertHead(LabelHead):
    """Linear layer, activation and norm, then the labels' linear layer."""

    def __init__(self, config: ModernBertConfig, build: BuildContext) -> None:
        super().__init__()
        self.dense = Linear(build, "head.dense", config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.act = activation(config.classifier_activation)
        self.norm = _norm(config, build, "head.norm")
        self.classifier = Linear(build, "classifier", config.hidden_size, config.num_labels, bias=True)

    def forward(self, pooled: Tensor, ctx: ForwardContext) -> Tensor:
        """See `LabelHead`."""
        scores: Tensor = self.classifier(self.norm(self.act(self.dense(pooled, ctx))), ctx)
        return scores


class ModernBertForSequenceClassification(ModernBertModel):
    """With a label head on the first token's state, or on the mean, as config.json says."""

    head_class = ModernBertHead

    def __init__(self, config: ModernBertConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.pooling = config.classifier_pooling.upper()


class ModernBertForMaskedLM(ModernBertModel):
    """As an embedding model: what predicts masked tokens is left out."""

    ignored = ("head.*", "decoder.*")
