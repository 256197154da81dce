"""Which of an engine's steps were repeated from a recording, and which ran call by call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvloom.runtime.capture import PlanCapture
from kvloom.runtime.forward import Forward
from kvloom_kernels.native import problem
from kvloom_kernels.plan import Plan


@dataclass
class Replays:
    """Steps within a block, in order.

    Attributes:
        decode: rows of each repeated decode step.
        prompts: tokens of each repeated step with prompts.
        recorded: how many ran while they were recorded.
        steps: how many there were in all.
    """

    decode: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    recorded: int = 0
    steps: int = 0

    def __len__(self) -> int:
        return len(self.decode) + len(self.prompts)

    @property
    def call_by_call(self) -> int:
        """How many steps were neither recorded nor repeated."""
        return self.steps - self.recorded - len(self)


@contextmanager
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replays]:
    """Steps that engines take within the block. Only what is recorded within it is seen when it is repeated."""
    seen = Replays()
    run, record, replay = Forward.run, PlanCapture._record, Plan.replay

    def counted_run(forward: Forward, *given: Any) -> Any:
        seen.steps += 1
        return run(forward, *given)

    def counted_record(capture: PlanCapture, *given: Any) -> Any:
        result = record(capture, *given)
        seen.recorded += 1
        return result

    def counted_replay(plan: Plan, rows: int | None = None) -> None:
        (seen.decode if plan._ranges is None else seen.prompts).append(plan.rows if rows is None else rows)
        replay(plan, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "run", counted_run)
        patch.setattr(PlanCapture, "_record", counted_record)
        patch.setattr(Plan, "replay", counted_replay)
        yield seen


def assert_repeated(seen: Replays) -> None:
    """No step ran call by call, and steps of both kinds were repeated. Without C++ kernels nothing is recorded."""
    if problem() is None:
        assert seen.call_by_call == 0, seen
        assert seen.decode, seen
        assert seen.prompts, seen
