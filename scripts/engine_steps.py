"""What each step of an engine takes: for benchmarks that look at steps one by one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from kvloom import LLM


class Step(NamedTuple):
    """Seconds of one, in all and by part."""

    whole_s: float
    parts_s: Mapping[str, float]


@contextmanager
def timed_steps(llm: LLM, parts_s: Counter[str] | None = None, before: Callable[[], None] | None = None) -> Iterator[list[Step]]:
    """Every step that the engine takes within the block, in order.

    Args:
        parts_s: where others add up seconds of a step by part; emptied before each.
        before: called before each step, outside of its seconds.
    """
    found: list[Step] = []
    noted: Counter[str] = Counter() if parts_s is None else parts_s
    engine = llm.llm_engine
    one_step = engine.step

    def step(call: Any = None) -> None:
        if before is not None:
            before()
        noted.clear()
        begun = time.perf_counter()
        one_step(call)
        found.append(Step(time.perf_counter() - begun, dict(noted)))

    engine.step = step
    try:
        yield found
    finally:
        engine.step = one_step


def note_seconds(owner: Any, name: str, parts_s: Counter[str]) -> None:
    """Replaces a method by one that adds what it takes to `parts_s`, under its name."""
    method: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any) -> Any:
        begun = time.perf_counter()
        try:
            return method(*args)
        finally:
            parts_s[name] += time.perf_counter() - begun

    setattr(owner, name, wrapper)
