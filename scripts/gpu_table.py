"""What a part of `scripts/gpu_check` found, and the markdown that is made of all parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """One table.

    Args:
        title: of the table.
        columns, rows: texts; every row has a cell for each column.
        notes: what a reader must know of the figures.
        failures: what is wrong; empty where all is well.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: a row has not {len(self.columns)} cells: {self.rows}")

    def markdown(self) -> str:
        """A heading, what failed, the table, the notes."""
        lines = [f"### {self.title}", *(f"**Failed**: {failure}" for failure in self.failures)]
        if self.rows:
            lines += ["", _line(self.columns), "|" + "---|" * len(self.columns), *map(_line, self.rows)]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(lines)


Checked = tuple[tuple[str, ...], list[str]]
"""A row, and what is wrong."""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def save(sections: Iterable[Section], file: Path) -> None:
    """As JSON, for `load`."""
    file.write_text(json.dumps([asdict(section) for section in sections]))


def load(file: Path) -> list[Section]:
    """What `save` wrote; nothing where a part wrote nothing."""
    if not file.exists():
        return []
    return [Section(s["title"], tuple(s["columns"]), tuple(map(tuple, s["rows"])), tuple(s["notes"]), tuple(s["failures"]))
            for s in json.loads(file.read_text())]


def percent(share: float | None) -> str:
    """Of one; a dash for what was not measured."""
    return "-" if share is None else f"{100 * share:.0f}%"


def microseconds(seconds: float | None) -> str:
    """A dash for what was not measured."""
    return "-" if seconds is None else f"{1e6 * seconds:.1f}" if seconds < 1e-3 else f"{1e6 * seconds:.0f}"


def ratio(above: float | None, below: float | None) -> str:
    """A dash where either was not measured."""
    return "-" if above is None or not below else f"{above / below:.2f}"


def finish(sections: Sequence[Section], out: str | None) -> int:
    """What a part's script does at its end: save for `scripts/gpu_check`, or print. The exit code: 1 where something failed."""
    if out is not None:
        save(sections, Path(out))
    else:
        print("\n\n".join(section.markdown() for section in sections))
    return 1 if any(section.failures for section in sections) else 0
