"""How many cores this process may use: those it may run on, and what every control group around it leaves. Torch-free."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvloom.runtime.control_groups import Group, groups_around, lines, number


@dataclass(frozen=True, slots=True)
class HostCores:
    """Cores that a process may use.

    Args:
        allowed: those that it may run on.
        physical: of these, such as are no second thread of another one.
        quota: seconds of all cores together that it gets in a second; None: no limit.
    """

    allowed: int
    physical: int
    quota: float | None = None

    @property
    def threads(self) -> int:
        """As many as can run at once. A quota of 1.5 is worth two: with one, the half would never be used. Threads of ours that wait
        soon sleep, so waiting does not use it up."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, math.ceil(self.quota)))


def host_cores(root: Path = Path("/"), allowed: frozenset[int] | None = None) -> HostCores:
    """Of this process. Docs: the kernel's admin-guide/cgroup-v2.rst (``cpu.max``) and scheduler/sched-bwc.rst, sched_getaffinity(2).

    Args:
        root: where ``/proc`` and ``/sys`` are found; tests give their own.
        allowed: numbers of the cores that it may run on; None: ask the system.
    """
    if allowed is None:
        allowed = frozenset(os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1))
    places = {_place(root, core) for core in allowed}
    return HostCores(len(allowed), len(places), min(_quotas(root), default=None))


def _place(root: Path, core: int) -> tuple[int, int]:
    """Where a core is: threads of one have the same; its own number when the system does not tell."""
    topology = root / f"sys/devices/system/cpu/cpu{core}/topology"
    package, place = number(topology / "physical_package_id"), number(topology / "core_id")
    return (-1, core) if place is None else (package or 0, place)


def _quotas(root: Path) -> Iterator[float]:
    """Of every control group that has one."""
    for group in groups_around("cpu", root):
        quota, period = _quota_and_period(group)
        if quota and period:
            yield quota / period


def _quota_and_period(group: Group) -> tuple[int | None, int | None]:
    """In microseconds."""
    if group.version == 1:
        return number(group.folder / "cpu.cfs_quota_us"), number(group.folder / "cpu.cfs_period_us")
    parts = "".join(lines(group.folder / "cpu.max")).split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts):  # "max 100000": no limit
        return None, None
    return int(parts[0]), int(parts[1])
