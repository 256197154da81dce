"""What is computed once and then again and again with other numbers in the same places: on a CPU, recorded kernel calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kvloom_kernels.plan import NotRecordableError, Plan, recorded
from kvloom_kernels.scratch import Arena, scratch_from

Replay = Callable[[int], None]
"""Computes again, for so many of the rows (from the first)."""

VIEWS = frozenset({"view", "_unsafe_view", "split", "split_with_sizes", "slice", "select", "unsqueeze", "squeeze", "transpose", "t",
                   "permute", "as_strided", "expand", "detach", "alias", "unbind", "narrow", "_reshape_alias"})
"""Operations of torch that compute nothing."""


class Capture(ABC):
    """A device's way to compute the same again without Python between its kernels."""

    @abstractmethod
    def size(self, rows: int, recorded: Collection[int], most: int) -> int:
        """For how many rows, at most `most`, a step of `rows` is computed: a size that was `recorded`, or one to be recorded now."""

    @abstractmethod
    def repeated_rows(self, rows: int, size: int) -> int:
        """How many a repetition of what was recorded for `size` rows computes for a step of `rows`."""

    @abstractmethod
    def record(self, compute: Callable[[], Sequence[Tensor]], rows: int) -> tuple[Replay, tuple[Tensor, ...]]:
        """Run `compute`, so that it can be repeated.

        Args:
            compute: reads fixed memory, works on `rows` rows each for itself, and returns tensors with a leading axis of `rows`.

        Returns:
            How to repeat it, and its results: the same memory each time, until something else is recorded or repeated.

        Raises:
            NotRecordableError: it does something that cannot be repeated. It may have run in part.
        """


class PlanCapture(Capture):
    """Records the calls of our C++ kernels.

    Args:
        arena: memory for everything that is computed.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def size(self, rows: int, recorded: Collection[int], most: int) -> int:
        """The smallest that serves, else a power of two: a plan runs for fewer rows at no cost, so a batch that shrinks records nothing
        more."""
        return min((size for size in recorded if size >= rows), default=min(1 << (rows - 1).bit_length(), most))

    def repeated_rows(self, rows: int, size: int) -> int:
        """No more than there are."""
        return rows

    def record(self, compute: Callable[[], Sequence[Tensor]], rows: int) -> tuple[Replay, tuple[Tensor, ...]]:
        """See `Capture.record`."""
        return self._record(compute, Plan(rows))

    def record_ranges(self, compute: Callable[[], Sequence[Tensor]], rows: int, ranges: int,
                      computed_rows: int) -> tuple[Replay, tuple[Tensor, ...]]:
        """See `Capture.record`, for rows that are cut into ranges; see `Plan`."""
        return self._record(compute, Plan(rows, ranges, computed_rows))

    def _record(self, compute: Callable[[], Sequence[Tensor]], plan: Plan) -> tuple[Replay, tuple[Tensor, ...]]:
        with recorded(plan), scratch_from(self._arena), OnlyViews(self._arena):
            results = compute()
            if any(r.shape[0] != plan.rows or not self._arena.holds(r) for r in results):
                raise NotRecordableError("its results are no rows of a kernel's result")
            fixed = tuple(self._arena.alias(r) for r in results)
        plan.keep(self._arena)
        return plan.replay, fixed


class OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it every operation of torch that computes, or allocates elsewhere than in the arena, raises `NotRecordableError`."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._arena = arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled. True makes torch import its compiler, which takes seconds and 70 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let views through; operations that are made of others are judged by those."""
        name = func.overloadpacket.__name__
        if name in VIEWS or (name == "lift_fresh" and self._arena.holds(args[0])):
            return func(*args, **(kwargs or {}))
        with self:
            made_of_others = func.decompose(*args, **(kwargs or {}))
        if made_of_others is NotImplemented:
            raise NotRecordableError(f"it computes with torch ({name})")
        return made_of_others


def patch_problem(model: object) -> str | None:
    """What was put into a model from outside that keeps it from being recorded, since it would not be called again: hooks, and methods
    that were replaced."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has hooks"
        replaced = next((attribute for attribute in vars(module) if callable(getattr(type(module), attribute, None))), None)
        if replaced is not None:
            return f"{replaced}() of {name or 'the model'} was replaced"
    return None
