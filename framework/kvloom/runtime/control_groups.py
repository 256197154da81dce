"""The control groups that a process is in, of version 1 and 2, and numbers in files of ``/proc`` and ``/sys``. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Group(NamedTuple):
    """A control group: its folder, and the version (1 or 2), which decides the names of the files in it."""

    folder: Path
    version: int


def groups_around(controller: str, root: Path = Path("/")) -> Iterator[Group]:
    """Groups around this process that may limit what `controller` (``memory``, ``cpu``) hands out, and all that contain them.

    Args:
        root: where ``/proc`` and ``/sys`` are found; tests give their own.
    """
    mounts = root / "sys/fs/cgroup"
    for line in lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            unified = mounts / "unified"  # beside hierarchies of version 1
            yield from (Group(folder, 2) for folder in _upwards(unified if unified.is_dir() else mounts, path))
        elif controller in controllers.split(","):
            own = mounts / controller
            yield from (Group(folder, 1) for folder in _upwards(own if own.is_dir() else mounts / controllers, path))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The group and all that contain it. Inside a container the path may be the host's: then only the mount itself exists."""
    group = mount / path.lstrip("/")
    while group != mount and mount in group.parents:
        yield group
        group = group.parent
    yield mount


def lines(path: Path) -> list[str]:
    """Of a file; none when it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def numbers(path: Path, scale: int = 1) -> dict[str, int]:
    """Lines such as ``MemTotal: 24683656 kB`` or ``inactive_file 4096``."""
    parts = [line.split() for line in lines(path)]
    return {p[0]: int(p[1]) * scale for p in parts if len(p) >= 2 and p[1].isdigit()}


def number(path: Path) -> int | None:
    """A file of one number; None for "max" and "-1", or when it is not there."""
    text = "".join(lines(path)).strip()
    return int(text) if text.isdigit() else None
