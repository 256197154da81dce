"""What a start took and what was chosen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvloom.logs import get_logger


class PhaseTimer:
    """Wall-clock seconds of named phases, from when it was made. What lies between two of them belongs to the later one."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []
        self._began_s = self._ended_s = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[list[tuple[str, float]]]:
        """Time a block. Parts of it that were timed elsewhere are given to the list: they are listed before it, and it is the rest."""
        parts: list[tuple[str, float]] = []
        yield parts
        started_s, self._ended_s = self._ended_s, time.perf_counter()
        whole_s = self._ended_s - started_s
        self.phases += [*parts, (name, whole_s - sum(seconds for _, seconds in parts))]

    @property
    def elapsed_s(self) -> float:
        """Since it was made, whether in a phase or not."""
        return time.perf_counter() - self._began_s


@dataclass(frozen=True, slots=True)
class StartReport:
    """What a start took, and what it led to.

    Args:
        phases: with their seconds.
        total_s: from the call to an engine that takes requests.
        kv_blocks, kv_tokens: what the KV cache holds.
        notes: lines about what was chosen, what was refused and why, what was left out.
    """

    phases: tuple[tuple[str, float], ...]
    total_s: float
    kv_blocks: int
    kv_tokens: int
    notes: tuple[str, ...]

    def text(self) -> str:
        """For people."""
        rows = [f"  {name:<16} {seconds:6.2f} s" for name, seconds in (*self.phases, ("total", self.total_s))]
        cache = f"  KV cache: {self.kv_blocks} blocks, {self.kv_tokens} tokens"
        return "\n".join(["start report", *rows, cache, *(f"  {note}" for note in self.notes)])

    def log(self, model: str) -> None:
        """One event."""
        get_logger().info("engine started", model=model, total_s=round(self.total_s, 3),
                          phases_s={name: round(seconds, 3) for name, seconds in self.phases}, kv_blocks=self.kv_blocks,
                          kv_tokens=self.kv_tokens, notes=list(self.notes))
