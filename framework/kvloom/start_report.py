"""What a start took and what was chosen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class PhaseTimer:
    """Wall-clock seconds of named phases."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block."""
        started = time.perf_counter()
        yield
        self.phases.append((name, time.perf_counter() - started))


@dataclass(frozen=True, slots=True)
class StartReport:
    """Phases with their seconds, and lines about what was chosen or left out. Names of import phases begin with "import"."""

    phases: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]

    @property
    def total_s(self) -> float:
        """Sum over the phases."""
        return sum(seconds for _, seconds in self.phases)

    @property
    def after_imports_s(self) -> float:
        """Sum over the phases that import nothing."""
        return sum(seconds for name, seconds in self.phases if not name.startswith("import"))

    def text(self) -> str:
        """For people."""
        rows = [f"  {name:<16} {seconds:6.2f} s" for name, seconds in (*self.phases, ("total", self.total_s))]
        return "\n".join(["start report", *rows, *(f"  {note}" for note in self.notes)])
