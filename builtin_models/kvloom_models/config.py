"""What our decoders may see of config.json. Defaults for missing keys are those of transformers' classes. Torch-free."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from kvloom.interfaces.model_config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT_LABELS = 2
"""What transformers assumes where config.json names no labels."""


class LabelledConfig(ModelConfig):
    """A model that may have a label head."""

    id2label: dict[str, str] = Field(default_factory=dict)
    num_labels: int = Field(default=DEFAULT_LABELS, gt=0, le=2**20)

    @model_validator(mode="before")
    @classmethod
    def _count_labels(cls, data: Any) -> Any:
        """config.json names the labels rather than counting them."""
        labels = data.get("id2label") if isinstance(data, dict) else None
        return {**data, "num_labels": len(labels)} if labels and isinstance(labels, dict) else data


class DecoderConfig(LabelledConfig):
    """A decoder of the Llama shape: what the families differ in, as answers that `CausalLM` and its layers ask for."""

    layer_types: tuple[str, ...] | None = None

    @property
    def qkv_bias(self) -> bool:
        """Whether query, key and value projections have biases."""
        return False

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output projection has one."""
        return False

    @property
    def feed_forward_bias(self) -> bool:
        """Whether the three projections of the MLP have biases."""
        return False

    def window_tokens(self, layer: int) -> int | None:
        """How many tokens, itself included, a token sees in this layer; None: all before it."""
        return None

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.intermediate_size < 1 or self.head_dim < 1:
            raise ValueError(f"intermediate_size and head_dim must be positive, got {self.intermediate_size} and {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                             f"({self.num_key_value_heads})")
        return self


class WindowedConfig(DecoderConfig):
    """A decoder some of whose layers see only the last `sliding_window` tokens."""

    def is_windowed(self, layer: int) -> bool:
        """Whether this layer has a window where config.json has no `layer_types`."""
        return True

    def window_tokens(self, layer: int) -> int | None:
        """See `DecoderConfig`. A window of 0 is no window."""
        windowed = self.is_windowed(layer) if self.layer_types is None else self.layer_types[layer] == SLIDING
        return self.sliding_window or None if windowed else None

    @model_validator(mode="after")
    def _check_layer_types(self) -> Self:
        if self.layer_types is None:
            return self
        if len(self.layer_types) != self.num_hidden_layers or not {FULL, SLIDING}.issuperset(self.layer_types):
            raise ValueError(f"layer_types must name {FULL} or {SLIDING} for each of the {self.num_hidden_layers} layers, "
                             f"got {list(self.layer_types)}")
        if SLIDING in self.layer_types and not self.sliding_window:
            raise ValueError(f"layer_types has {SLIDING}, but sliding_window is {self.sliding_window}")
        return self


class AttentionBiasConfig(DecoderConfig):
    """A decoder whose config.json says whether its attention's projections have biases."""

    attention_bias: bool = False

    @property
    def qkv_bias(self) -> bool:
        """See `DecoderConfig`."""
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        """See `DecoderConfig`."""
        return self.attention_bias


class LlamaConfig(AttentionBiasConfig):
    """``model_type`` llama."""

    mlp_bias: bool = False

    @property
    def feed_forward_bias(self) -> bool:
        """See `DecoderConfig`."""
        return self.mlp_bias


class MistralConfig(WindowedConfig):
    """``model_type`` mistral: all layers have the window, unless `layer_types` says otherwise."""

    max_position_embeddings: int = Field(default=4096 * 32, gt=0)
    sliding_window: int | None = Field(default=4096, ge=0)


class Qwen2Config(WindowedConfig):
    """``model_type`` qwen2: with ``use_sliding_window``, layers from ``max_window_layers`` on have the window."""

    max_position_embeddings: int = Field(default=32768, gt=0)
    sliding_window: int | None = Field(default=4096, ge=0)
    use_sliding_window: bool = False
    max_window_layers: int = Field(default=28, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _drop_unused_window(cls, data: Any) -> Any:
        """Real checkpoints carry a sliding_window that they do not use."""
        if isinstance(data, dict) and not data.get("use_sliding_window"):
            return {**data, "sliding_window": None}
        return data

    @property
    def qkv_bias(self) -> bool:
        """See `DecoderConfig`: always, though config.json does not say so."""
        return True

    def is_windowed(self, layer: int) -> bool:
        """See `WindowedConfig`."""
        return layer >= self.max_window_layers


class Qwen3Config(AttentionBiasConfig, Qwen2Config):
    """``model_type`` qwen3."""

    @model_validator(mode="before")
    @classmethod
    def _default_head_dim(cls, data: Any) -> Any:
        """128 whatever the hidden size."""
        return {**data, "head_dim": data.get("head_dim") or 128} if isinstance(data, dict) else data
