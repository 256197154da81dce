"""A model that somebody else wrote with our layers, and its plugin: each half of a layer has a norm before it and one after it, every
second layer a window, and scores are capped."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kvloom import hookimpl
from kvloom.interfaces import (
    BuildContext,
    ForwardContext,
    LayerStateSpec,
    Model,
    ModelConfig,
    ModelInputs,
    ModelOutputs,
    ModuleTarget,
    Registrar,
)
from kvloom.layers import Attention, Embedding, GateUpLinear, QKVLinear, RMSNorm, Rotary, Rotation, RowLinear, attention_state

KVLOOM_API = {"models": 0}
NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp")
WINDOW_TOKENS = 12


class SandwichConfig(ModelConfig):
    """What it sees of config.json."""


def window_of(index: int) -> int | None:
    """Of a layer."""
    return WINDOW_TOKENS if index % 2 else None


class SandwichLayer(nn.Module):
    """norm, attention, norm, add; norm, MLP, norm, add. The additions are part of the norm that comes next."""

    def __init__(self, config: ModelConfig, build: BuildContext, index: int) -> None:
        super().__init__()
        heads, kv_heads, head_dim, hidden = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.prefix = f"layers.{index}"
        self.norms = nn.ModuleDict({name: RMSNorm(build, f"{self.prefix}.{name}", hidden, config.rms_norm_eps) for name in NORMS})
        self.qkv = QKVLinear(build, f"{self.prefix}.q", hidden, heads, kv_heads, head_dim)
        self.attend = Attention(build, index, heads, kv_heads, head_dim, window_tokens=window_of(index), soft_cap=20.0)
        self.out = RowLinear(build, f"{self.prefix}.o", heads * head_dim, hidden)
        self.gate_up = GateUpLinear(build, f"{self.prefix}.gate", hidden, config.intermediate_size)
        self.down = RowLinear(build, f"{self.prefix}.down", config.intermediate_size, hidden)

    def forward(self, x: Tensor, residual: Tensor | None, rotation: Rotation, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """All ``[T, H]``."""
        x, residual = self.norms["before_attention"].add(x, residual)
        x = self.out(self.attend(*self.qkv(x, ctx), rotation, ctx), ctx)
        x, residual = self.norms["before_mlp"].add(self.norms["after_attention"](x), residual)
        return self.norms["after_mlp"](self.down(self.gate_up(x, ctx, "silu"), ctx)), residual

    def module_map(self) -> dict[str, ModuleTarget]:
        """See `Model.module_map`."""
        found = {f"{self.prefix}.{name}": ModuleTarget(norm) for name, norm in self.norms.items()}
        found |= {f"{self.prefix}.{shard}": ModuleTarget(self.qkv, shard) for shard in ("q", "k", "v")}
        found |= {f"{self.prefix}.{shard}": ModuleTarget(self.gate_up, shard) for shard in ("gate", "up")}
        return found | {f"{self.prefix}.o": ModuleTarget(self.out), f"{self.prefix}.down": ModuleTarget(self.down)}


class SandwichForCausalLM(nn.Module, Model):
    """With a tied head."""

    def __init__(self, config: SandwichConfig, build: BuildContext) -> None:
        super().__init__()
        self.config, self._build = config, build
        self.embedding = Embedding(build, "embedding", config.vocab_size, config.hidden_size, is_head=True)
        self.rotary = Rotary(build, config.rope, config.head_dim, config.max_position_embeddings)
        self.layers = nn.ModuleList(SandwichLayer(config, build, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(build, "norm", config.hidden_size, config.rms_norm_eps)

    def forward(self, inputs: ModelInputs, ctx: ForwardContext) -> ModelOutputs:
        """See `Model.forward`."""
        x, residual, rotation = self.embedding(inputs.token_ids, ctx), None, self.rotary(inputs.positions[0])
        for layer in self.layers:
            x, residual = layer(x, residual, rotation, ctx)
        return ModelOutputs(self.norm.add(x, residual)[0])

    def logits(self, hidden: Tensor, ctx: ForwardContext) -> Tensor:
        """See `Model.logits`."""
        return self.embedding.logits(hidden, ctx)

    def state_specs(self) -> list[LayerStateSpec]:
        """See `Model.state_specs`."""
        c = self.config
        return [attention_state(self._build, c.num_attention_heads, c.num_key_value_heads, c.head_dim, window_tokens=window_of(i))
                for i in range(c.num_hidden_layers)]

    def module_map(self) -> Mapping[str, ModuleTarget]:
        """See `Model.module_map`."""
        found = {"embedding": ModuleTarget(self.embedding), "norm": ModuleTarget(self.norm)}
        for layer in self.layers:
            found |= layer.module_map()
        return found


@hookimpl
def kvloom_register_models(registry: Registrar) -> None:
    """One architecture."""
    registry.add("SandwichForCausalLM", f"{__name__}:SandwichForCausalLM", config=f"{__name__}:SandwichConfig")
