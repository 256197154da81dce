"""What a pooling request may ask of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvloom.errors import RequestValidationError, shown
from kvloom.params import PoolingParams
from kvloom.prompts import check_token_ids

if TYPE_CHECKING:
    from kvloom.runtime.pooling import PoolerSet

SERVED: Mapping[str, tuple[str, ...]] = {
    "embed": ("embed", "token_embed"), "classify": ("classify", "score", "token_classify"),
    "score": ("score", "classify", "token_classify"), "reward": ("reward", "token_classify"),
}
"""Task of an engine -> tasks that its requests may have; score needs one label."""
STEPS = "STEP"
"""Pooling type with a tag."""


@dataclass(frozen=True, slots=True)
class PoolingRules:
    """Of one engine. `poolers`: what pools."""

    poolers: PoolerSet

    @property
    def task(self) -> str:
        """The engine's."""
        return self.poolers.plan.task

    def check_task(self, task: str | None) -> None:
        """Raises `RequestValidationError` for a task of another kind of engine."""
        served = [t for t in SERVED[self.task] if t != "score" or self.poolers.plan.num_labels == 1]
        if task is not None and task not in served:
            raise RequestValidationError(f"this engine runs with task={self.task!r}, whose requests may be for {', '.join(served)}; "
                                         f"got {shown(task)}", "pooling_task", task)

    def check_one_row(self, method: str) -> None:
        """Raises `RequestValidationError` for a method that gives one row a prompt where there are several."""
        if self.poolers.pooler(PoolingParams()).gives_rows:
            kind = self.poolers.pooling_type
            raise RequestValidationError(f"LLM.{method}() gives one row a prompt, but this engine pools with {kind}, which gives rows "
                                         "for tokens: call encode, or make the LLM with another pooling_type", "pooling_type", kind)

    def checked(self, params: PoolingParams) -> PoolingParams:
        """A checked copy of the caller's.

        Raises:
            RequestValidationError: a field that means nothing here, or a value that the model does not have.
        """
        own = params.clone()
        self.check_task(own.task)
        if own.dimensions is not None:
            self._check_dimensions(own.dimensions)
        if own.returned_token_ids is not None:
            self.check_columns(own.returned_token_ids)
        if own.step_tag_id is not None:
            self._check_step(own.step_tag_id)
        return own

    def check_columns(self, columns: Sequence[int]) -> None:
        """Raises `RequestValidationError` for columns that the label head does not have."""
        count = self.poolers.plan.num_labels
        if count is None:
            raise RequestValidationError("returned_token_ids choose scores of labels, this engine gives embeddings",
                                         "returned_token_ids", list(columns))
        if len(columns) > count:
            raise RequestValidationError(f"returned_token_ids has {len(columns)} columns, the label head has {count}",
                                         "returned_token_ids", len(columns))
        bad = next((c for c in columns if c >= count), None)
        if bad is not None:
            raise RequestValidationError(f"returned_token_ids are columns 0 to {count - 1} of the label head, got {bad}",
                                         "returned_token_ids", bad)

    def check_defaults(self, vocab_size: int) -> None:
        """What the caller's `PoolerConfig` says of the model. Raises `RequestValidationError`.

        Args:
            vocab_size: ids that the model embeds.
        """
        config = self.poolers.plan.config
        if config.returned_token_ids is not None:
            self.check_columns(config.returned_token_ids)
        if config.step_tag_id is not None:
            self._check_step(config.step_tag_id)
            check_token_ids([config.step_tag_id], vocab_size)

    def _check_step(self, tag_id: int) -> None:
        if self.poolers.pooling_type != STEPS:
            raise RequestValidationError(f"step_tag_id belongs to pooling type {STEPS}, this engine pools with "
                                         f"{self.poolers.pooling_type}", "step_tag_id", tag_id)

    def _check_dimensions(self, wanted: int) -> None:
        plan = self.poolers.plan
        if plan.labels:
            raise RequestValidationError(f"dimensions are those of an embedding, this engine runs with task={plan.task!r}",
                                         "dimensions", wanted)
        if plan.dimensions is None:
            raise RequestValidationError("this model was not trained to be cut (Matryoshka), so dimensions cannot be set; if it was, "
                                         "say so: hf_overrides={'is_matryoshka': True}", "dimensions", wanted)
        if wanted > plan.embedding_size or (plan.dimensions and wanted not in plan.dimensions):
            valid = ", ".join(map(str, plan.dimensions)) if plan.dimensions else f"1 to {plan.embedding_size}"
            raise RequestValidationError(f"dimensions of this model's embeddings may be {valid}; got {wanted}", "dimensions",
                                         wanted)

    def reads_prefix_cache(self, params: PoolingParams) -> bool:
        """Whether cached tokens need not be computed: their hidden states are not kept."""
        return self.poolers.pooler(params).needs == "last" and not params.skip_reading_prefix_cache

    def check_start(self, params: PoolingParams, token_ids: Sequence[int]) -> None:
        """Raise what the pooler refuses."""
        error = self.poolers.start(params, token_ids).error
        if error is not None:
            raise error
