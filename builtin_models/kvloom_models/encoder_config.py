"""What our encoders may see of config.json. Defaults for missing keys are those of transformers' classes. Torch-free."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from kvloom.interfaces.model_config import RopeParameters
from kvloom_models.config import FULL, SLIDING, LabelledConfig


class EncoderConfig(LabelledConfig):
    """What the families share."""

    hidden_act: str = "gelu"
    layer_norm_eps: float = Field(default=1e-12, gt=0)
    max_position_embeddings: int = Field(default=512, gt=0)
    pad_token_id: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.intermediate_size < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(f"intermediate_size ({self.intermediate_size}) must be positive, hidden_size ({self.hidden_size}) a "
                             f"multiple of num_attention_heads ({self.num_attention_heads})")
        return self


class BertConfig(EncoderConfig):
    """``model_type`` bert."""

    type_vocab_size: int = Field(default=2, gt=0, le=2**16)
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: Literal[False] = False


class RobertaConfig(BertConfig):
    """``model_type`` roberta and xlm-roberta: positions are counted from ``pad_token_id + 1`` on."""

    pad_token_id: int = Field(default=1, ge=0)

    @property
    def first_position(self) -> int:
        """See `ModelConfig`."""
        return self.pad_token_id + 1

    @model_validator(mode="after")
    def _check_positions(self) -> Self:
        if self.first_position >= self.max_position_embeddings:
            raise ValueError(f"pad_token_id {self.pad_token_id} leaves no position of {self.max_position_embeddings}")
        return self


class DistilBertConfig(EncoderConfig):
    """``model_type`` distilbert, which has its own names for what others share."""

    sinusoidal_pos_embds: bool = Field(default=False, description="how the table was made; it is in the checkpoint either way")

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
                 "hidden_dim": "intermediate_size", "activation": "hidden_act"}
        return data | {ours: data[theirs] for theirs, ours in names.items() if theirs in data}


class ModernBertConfig(EncoderConfig):
    """``model_type`` modernbert: two kinds of layers, each with its own rotary embedding; `layer_types` says which is which."""

    hidden_act: str = Field(default="gelu", alias="hidden_activation")
    norm_eps: float = Field(default=1e-5, gt=0)
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    classifier_pooling: Literal["cls", "mean"] = "cls"
    max_position_embeddings: int = Field(default=8192, gt=0)
    local_attention: int = Field(default=128, gt=0)
    global_attn_every_n_layers: int = Field(default=3, gt=0)
    layer_types: tuple[str, ...] = ()
    ropes: dict[str, RopeParameters] = Field(default_factory=dict, description="by layer type")

    @model_validator(mode="before")
    @classmethod
    def _read_ropes(cls, data: Any) -> Any:
        """``rope_parameters`` by layer type (new), or a theta for each type (old)."""
        if not isinstance(data, dict):
            return data
        given = data.get("rope_parameters") or {}
        ropes = {}
        for kind, theta, default in ((FULL, "global_rope_theta", 160_000.0), (SLIDING, "local_rope_theta", 10_000.0)):
            own = given.get(kind) if isinstance(given, dict) else None
            ropes[kind] = {"rope_theta": data.get(theta, default), **(own or {})}
        return data | {"ropes": ropes}

    @model_validator(mode="after")
    def _check_layer_types(self) -> Self:
        if self.layer_types and (len(self.layer_types) != self.num_hidden_layers or not {FULL, SLIDING}.issuperset(self.layer_types)):
            raise ValueError(f"layer_types must name {FULL} or {SLIDING} for each of the {self.num_hidden_layers} layers, "
                             f"got {list(self.layer_types)}")
        return self

    def layer_type(self, layer: int) -> str:
        """Whether a layer's tokens see all others or those nearby."""
        if self.layer_types:
            return self.layer_types[layer]
        return SLIDING if layer % self.global_attn_every_n_layers else FULL

    def window_tokens(self, layer: int) -> int | None:
        """A token and how many on either side it sees: half of `local_attention`; None: all."""
        return self.local_attention // 2 + 1 if self.layer_type(layer) == SLIDING else None
