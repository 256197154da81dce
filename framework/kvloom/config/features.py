"""Features that come later, and what is reported."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from kvloom.config.class_path import ClassPath
from kvloom.config.pooler import PoolerConfig
from kvloom.config.section import Section, Unsupported
from kvloom.structured_outputs import BackendChoice


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
    guided_decoding_backend: Annotated[str, Field(description="grammar backend of structured output: auto, or a registered name; "
                                                  "options after a colon: disable-any-whitespace, "
                                                  "disable-additional-properties")] = "auto"
    max_logprobs: Annotated[int, Field(ge=-1, description="most candidates that a request may want with each token; -1: no bound")] = 20
    logits_processors: Annotated[tuple[ClassPath, ...] | None, Field(
        strict=False, description="subclasses of `kvloom.interfaces.LogitsProcessor`, or where they are ('package.module:Class'), that "
        "run besides the registered ones")] = None
    disable_log_stats: Annotated[bool, Field(description="False: an event with throughput and cache use every 10 seconds and when the "
                                             "engine runs out of work. Metrics of requests are always there")] = True

    @field_validator("guided_decoding_backend")
    @classmethod
    def _check_backend(cls, value: str) -> str:
        BackendChoice.parse(value)
        return value

    @field_validator("override_pooler_config", mode="before")
    @classmethod
    def _from_fields(cls, value: Any) -> Any:
        return PoolerConfig(**value) if isinstance(value, dict) and all(isinstance(k, str) for k in value) else value
