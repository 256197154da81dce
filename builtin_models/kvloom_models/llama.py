"""Llama 2 and 3 (Touvron et al., 2023; Llama Team, 2024), and every family that differs only in what `DecoderConfig` answers.

Shapes: T tokens of this step, H hidden size, I intermediate size, D head dimension; Hq query heads and Hk kv heads of this rank.
With tensor parallelism a layer's input and output are whole on every rank; heads and I are divided inside.
"""

from __future__ import annotations

from torch import Tensor, nn

from kvloom.interfaces.model import BuildContext, ForwardContext, ModuleTarget
from kvloom.layers import Attention, GateUpLinear, QKVLinear, RMSNorm, Rotation, RowLinear
from kvloom_models.config import DecoderConfig
from kvloom_models.decoder import CausalLM, DecoderLayer
from kvloom_models.labels import SequenceClassifier


class LlamaAttention(nn.Module):
    """Grouped-query self-attention. `head_norm_eps` given: queries and keys are normalised per head before the rotation."""

    def __init__(self, config: DecoderConfig, build: BuildContext, index: int, prefix: str, *,
                 head_norm_eps: float | None = None) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.prefix = prefix
        self.qkv_proj = QKVLinear(build, f"{prefix}.q_proj", config.hidden_size, heads, kv_heads, head_dim, bias=config.qkv_bias)
        self.o_proj = RowLinear(build, f"{prefix}.o_proj", heads * head_dim, config.hidden_size, bias=config.output_bias)
        self.q_norm, self.k_norm = (None if head_norm_eps is None else RMSNorm(build, f"{prefix}.{name}", head_dim, head_norm_eps)
                                    for name in ("q_norm", "k_norm"))
        self.attend = Attention(build, index, heads, kv_heads, head_dim, window_tokens=config.window_tokens(index),
                                q_norm=self.q_norm, k_norm=self.k_norm)

    def forward(self, x: Tensor, rotation: Rotation, ctx: ForwardContext) -> Tensor:
        """``[T, H] -> [T, H]``."""
        q, k, v = self.qkv_proj(x, ctx)                  # [T, Hq, D], [T, Hk, D], [T, Hk, D]
        seen: Tensor = self.attend(q, k, v, rotation, ctx)  # [T, Hq * D]
        y: Tensor = self.o_proj(seen, ctx)               # [T, H], summed over the ranks
        return y

    def module_map(self) -> dict[str, ModuleTarget]:
        """See `Model.module_map`."""
        targets = {f"{self.prefix}.{shard}_proj": ModuleTarget(self.qkv_proj, shard) for shard in ("q", "k", "v")}
        targets[f"{self.prefix}.o_proj"] = ModuleTarget(self.o_proj)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                targets[norm.prefix] = ModuleTarget(norm)
        return targets


class LlamaMLP(nn.Module):
    """Gated MLP: ``down(act(gate(x)) * up(x))`` (SwiGLU; Shazeer, 2020)."""

    def __init__(self, config: DecoderConfig, build: BuildContext, prefix: str) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.feed_forward_bias
        self.prefix = prefix
        self.gate_up_proj = GateUpLinear(build, f"{prefix}.gate_proj", hidden, inner, bias=bias)
        self.down_proj = RowLinear(build, f"{prefix}.down_proj", inner, hidden, bias=bias)
        self.act = config.hidden_act

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """``[T, H] -> [T, H]``."""
        inner: Tensor = self.gate_up_proj(x, ctx, self.act)  # [T, I / size]
        y: Tensor = self.down_proj(inner, ctx)               # [T, H], summed over the ranks
        return y

    def module_map(self) -> dict[str, ModuleTarget]:
        """See `Model.module_map`."""
        return {
            f"{self.prefix}.gate_proj": ModuleTarget(self.gate_up_proj, "gate"),
            f"{self.prefix}.up_proj": ModuleTarget(self.gate_up_proj, "up"),
            f"{self.prefix}.down_proj": ModuleTarget(self.down_proj),
        }


class LlamaLayer(DecoderLayer):
    """Attention and MLP, each behind a norm, each added to the residual stream. Addition and next norm are one call."""

    def __init__(self, config: DecoderConfig, build: BuildContext, index: int) -> None:
        super().__init__(config, build, index)
        self.input_layernorm = RMSNorm(build, f"{self.prefix}.input_layernorm", config.hidden_size, config.rms_norm_eps)
        self.self_attn = self.make_attention(config, build, index)
        self.post_attention_layernorm = RMSNorm(build, f"{self.prefix}.post_attention_layernorm", config.hidden_size,
                                                config.rms_norm_eps)
        self.mlp = LlamaMLP(config, build, f"{self.prefix}.mlp")

    def make_attention(self, config: DecoderConfig, build: BuildContext, index: int) -> LlamaAttention:
        """What a family with another attention replaces."""
        return LlamaAttention(config, build, index, f"{self.prefix}.self_attn")

    def forward(self, x: Tensor, residual: Tensor | None, rotation: Rotation, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """See `DecoderLayer.forward`; all tensors are ``[T, H]``."""
        x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, rotation, ctx)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x, ctx), residual

    def module_map(self) -> dict[str, ModuleTarget]:
        """See `Model.module_map`."""
        norms = {norm.prefix: ModuleTarget(norm) for norm in (self.input_layernorm, self.post_attention_layernorm)}
        return norms | self.self_attn.module_map() | self.mlp.module_map()


class LlamaForCausalLM(CausalLM):
    """Llama 2 and 3; also what was saved under this architecture with biases, other head sizes or tied embeddings."""

    layer_class = LlamaLayer


class LlamaModel(LlamaForCausalLM):
    """The same without an output head: for embeddings."""

    tasks = ("embed",)


class LlamaForSequenceClassification(SequenceClassifier, LlamaForCausalLM):
    """With a label head on the last token."""
