"""Features that come later, and what is reported."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from kvloom.config.pooler import PoolerConfig
from kvloom.config.section import NoEffect, Section, Unsupported


class FeatureSection(Section):
    """Adapters, media, speculation, structured output, logs."""

    enable_lora: Annotated[bool, Field(description="serve LoRA adapters"), Unsupported("merge the adapter into the checkpoint")] = False
    max_loras: Annotated[int, Field(ge=1, description="adapters at once"), Unsupported("leave it at 1: no adapters so far")] = 1
    max_lora_rank: Annotated[int, Field(ge=1, description="largest rank"), Unsupported("leave it at 16: no adapters so far")] = 16
    limit_mm_per_prompt: Annotated[dict[str, int] | None, Field(description="media of a prompt"),
                                   Unsupported("text only so far")] = None
    mm_processor_kwargs: Annotated[dict[str, Any] | None, Field(description="for media processors"),
                                   Unsupported("text only so far")] = None
    override_pooler_config: Annotated[PoolerConfig | None, Field(description="how hidden states are pooled, a PoolerConfig or a "
                                                                 "dict of its fields; wins over the checkpoint's modules.json")] = None
    speculative_config: Annotated[dict[str, Any] | None, Field(description="draft tokens"), Unsupported("leave it out")] = None
    guided_decoding_backend: Annotated[str, Field(description="library for structured output"),
                                       Unsupported("leave it at 'auto'")] = "auto"
    max_logprobs: Annotated[int, Field(ge=-1, description="most candidates that a request may want with each token; -1: no bound")] = 20
    disable_log_stats: Annotated[bool, Field(description="leave metrics out"),
                                 NoEffect("RequestOutput.metrics is always set: it costs a few clock reads")] = True

    @field_validator("override_pooler_config", mode="before")
    @classmethod
    def _from_fields(cls, value: Any) -> Any:
        return PoolerConfig(**value) if isinstance(value, dict) and all(isinstance(k, str) for k in value) else value
