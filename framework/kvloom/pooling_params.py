"""Parameters of a pooling request. Torch-free."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

from kvloom import other_fields
from kvloom.errors import RequestValidationError
from kvloom.other_fields import refuses
from kvloom.param_checks import check_bool, check_extra_args, check_ids, check_int

POOLING_TASKS = ("embed", "classify", "score", "reward", "token_embed", "token_classify")
"""What a pooling request may be for; those that begin with ``token_`` give one row a token."""


@refuses(other_fields.POOLING)
@dataclass
class PoolingParams:
    """How to pool. What is None is the engine's to say: its pooler configuration, then the checkpoint, then the model.

    Args:
        dimensions: length of the embedding, for models that were trained to be cut (Matryoshka); it is normalized after the cut.
        additional_data: JSON data for poolers of plugins.
        use_activation: False gives embeddings that are not normalized, and raw scores of labels.
        truncate_prompt_tokens: longest prompt; a longer text is cut as the tokenizer cuts, of longer token prompts the last tokens
            stay. -1: what the model can take.
        step_tag_id: with STEP pooling only rows of this token are given.
        returned_token_ids: columns of the label head's output that are given.
        task: one of `POOLING_TASKS`; None: the engine's.
        skip_reading_prefix_cache: True computes every token of the prompt.
        extra_kwargs: JSON objects by name, for poolers of plugins.

    Raises:
        RequestValidationError: a value is out of range or of the wrong type.
    """

    dimensions: int | None = None
    additional_data: Any = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    step_tag_id: int | None = None
    returned_token_ids: list[int] | None = None
    task: str | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field. Called at construction and at admission."""
        if self.dimensions is not None:
            self.dimensions = check_int("dimensions", self.dimensions, 1)
        for name in ("use_activation", "skip_reading_prefix_cache"):
            if getattr(self, name) is not None:
                check_bool(name, getattr(self, name))
        check_truncation(self.truncate_prompt_tokens)
        if self.step_tag_id is not None:
            self.step_tag_id = check_int("step_tag_id", self.step_tag_id, 0)
        self.returned_token_ids = check_ids("returned_token_ids", self.returned_token_ids)
        if self.returned_token_ids == []:
            raise RequestValidationError("returned_token_ids must name at least one column, or be None", "returned_token_ids", [])
        if self.task is not None and self.task not in POOLING_TASKS:
            raise RequestValidationError(f"task must be one of {', '.join(POOLING_TASKS)}, or None; got {self.task!r:.100}", "task",
                                         self.task)
        check_extra_args("additional_data", None if self.additional_data is None else {"data": self.additional_data})
        check_extra_args("extra_kwargs", self.extra_kwargs)

    def clone(self) -> Self:
        """An independent, checked copy."""
        own = copy.copy(self)
        own.validate()  # before the deep copy: what it lets through can be copied
        return copy.deepcopy(own)


def check_truncation(value: int | None) -> None:
    """Raises `RequestValidationError` unless it is None, -1 or at least 1."""
    if value is not None and check_int("truncate_prompt_tokens", value, -1) == 0:
        raise RequestValidationError("truncate_prompt_tokens must be at least 1, or -1", "truncate_prompt_tokens", 0)
