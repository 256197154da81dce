"""How much runs at once, and in which order."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from kvloom.config.class_path import ClassPath
from kvloom.config.section import Section
from kvloom.core.limits import SchedulerLimits
from kvloom.errors import ConfigError

DEFAULT_BATCHED_TOKENS = 2048
"""Measured on 2 CPU cores: between 256 and 2048 the throughput does not change once warm; larger steps only delay decodes."""


class SchedulerSection(Section):
    """The scheduler."""

    max_num_seqs: Annotated[int, Field(ge=1, le=2**16, description="sequences that run at once; None: 256")] = 256
    max_num_batched_tokens: Annotated[int | None, Field(ge=1, le=2**24, description="token budget of a step; None: 2048, or "
                                                        "max_model_len where prompts are not cut")] = None
    long_prefill_token_threshold: Annotated[int, Field(ge=0, description="most tokens of one request in one step; 0: no bound")] = 0
    enable_chunked_prefill: Annotated[bool, Field(description="long prompts are computed over several steps; None: True")] = True
    scheduling_policy: Annotated[str, Field(min_length=1, description="fcfs, priority, or a plugin's name")] = "fcfs"
    scheduler_cls: Annotated[ClassPath, Field(description="a subclass of `kvloom.interfaces.SchedulingPolicy`, or where it is "
                                              "('package.module:Class'), instead of `scheduling_policy`")] = None

    @field_validator("max_num_seqs", "enable_chunked_prefill", mode="before")
    @classmethod
    def _none_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @model_validator(mode="after")
    def _one_policy(self) -> Self:
        if self.scheduler_cls is not None and self.scheduling_policy != "fcfs":
            raise ValueError(f"scheduler_cls and scheduling_policy={self.scheduling_policy!r} mean the same; give one of them")
        return self

    def limits(self, max_model_len: int, *, enable_prefix_caching: bool, chunkable: bool) -> SchedulerLimits:
        """What the scheduler is bounded by, once the model is known.

        Raises:
            ConfigError: the token budget cannot serve max_num_seqs decodes, or a prompt that may not be cut.
        """
        cut = self.enable_chunked_prefill and chunkable
        budget = self.max_num_batched_tokens
        if budget is None:
            budget = max(DEFAULT_BATCHED_TOKENS, self.max_num_seqs, 0 if cut else max_model_len)
        if budget < self.max_num_seqs:
            raise ConfigError(f"max_num_batched_tokens={budget} must be at least max_num_seqs={self.max_num_seqs}: a step decodes one "
                              "token of each running sequence. Raise the first or lower the second")
        return SchedulerLimits(
            max_model_len=max_model_len, max_num_seqs=self.max_num_seqs, max_num_batched_tokens=budget,
            long_prefill_token_threshold=self.long_prefill_token_threshold, enable_chunked_prefill=self.enable_chunked_prefill,
            enable_prefix_caching=enable_prefix_caching, chunkable=chunkable)
