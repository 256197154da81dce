"""The part of config.json that a model may see: an allow-list of keys, checked, frozen. Torch-free.

A model class names its own subclass (``registry.add(..., config=LlamaConfig)``); keys that the subclass does not declare never
reach the model, so a checkpoint cannot steer code by inventing keys.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RopeParameters(BaseModel):
    """Rotary embedding, from ``rope_theta`` + ``rope_scaling`` or from ``rope_parameters``, whichever config.json has.

    Names are those of transformers' ``rope_parameters``. ``rope_type``: default, linear, dynamic, llama3, yarn.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    rope_type: str = "default"
    rope_theta: float = Field(default=10000.0, gt=0)
    factor: float = Field(default=1.0, gt=0)
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ModelConfig(BaseModel):
    """Fields that every decoder shares, under their config.json names. Subclass it to allow more keys.

    Sizes are those of the whole model, before any sharding. Unknown keys are dropped, NaN and infinity are refused.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())

    architectures: tuple[str, ...] = ()
    model_type: str = ""
    vocab_size: int = Field(gt=0, le=2**24)
    hidden_size: int = Field(gt=0, le=2**20)
    num_hidden_layers: int = Field(gt=0, le=2**12)
    num_attention_heads: int = Field(gt=0, le=2**14)
    num_key_value_heads: int = Field(default=0, ge=0, le=2**14, description="0: as many as num_attention_heads")
    head_dim: int = Field(default=0, ge=0, le=2**16, description="0: hidden_size / num_attention_heads")
    intermediate_size: int = Field(default=0, ge=0, le=2**22)
    hidden_act: str = "silu"
    max_position_embeddings: int = Field(default=2048, gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    rope: RopeParameters = Field(default_factory=RopeParameters)
    tie_word_embeddings: bool = False
    sliding_window: int | None = Field(default=None, ge=0)
    dtype: str | None = Field(default=None, description="dtype of the checkpoint, as config.json says")
    quantization_config: dict[str, Any] | None = None

    @property
    def first_position(self) -> int:
        """Index in the position table of a sequence's first token: positions before it are nobody's."""
        return 0

    @model_validator(mode="before")
    @classmethod
    def _fill_heads(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        heads = data.get("num_attention_heads")
        data["num_key_value_heads"] = data.get("num_key_value_heads") or heads or 0
        if not data.get("head_dim") and isinstance(heads, int) and heads > 0:
            data["head_dim"] = int(data.get("hidden_size") or 0) // heads
        return data
