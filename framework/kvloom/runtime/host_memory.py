"""How much memory this process may still use: the machine's, and that of every control group it is in. Torch-free."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvloom.interfaces import Worker
from kvloom.runtime.control_groups import groups_around, number, numbers

FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
         2: ("memory.max", "memory.current", "inactive_file")}
"""Of a control group, by its version: limit, use, and the name of its cache that can be dropped."""
UNLIMITED_BYTES = 2**60
"""Limits from here on mean none: version 1 writes "no limit" as a number near 2**63."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory that a model may live in.

    Args:
        total_bytes: of the machine, or of the tightest limit on this process.
        free_bytes: what this process may still take.
        own_bytes: what it holds already.
    """

    total_bytes: int
    free_bytes: int
    own_bytes: int = 0

    @property
    def held_by_others_bytes(self) -> int:
        """Neither free nor ours."""
        return max(0, self.total_bytes - self.free_bytes - self.own_bytes)


def host_memory(root: Path = Path("/")) -> DeviceMemory:
    """The smaller of ``MemAvailable`` and what each memory control group (version 1 or 2) around this process leaves.

    File cache that the kernel can drop counts as free, in a group too (``inactive_file``). Docs: the kernel's
    admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst, proc(5).

    Args:
        root: where ``/proc`` and ``/sys`` are found; tests give their own.
    """
    meminfo = numbers(root / "proc/meminfo", scale=1024)
    total = meminfo.get("MemTotal:") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = meminfo.get("MemAvailable:", total)
    for limit, left in _group_limits(root):
        free = min(free, max(0, left))
        total = min(total, limit)
    return DeviceMemory(total, free, numbers(root / "proc/self/status", scale=1024).get("RssAnon:", 0))


def release_freed() -> None:
    """Collect cycles (modules and their parameters refer to each other), and hand back what that frees."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Hand what the C library's heap keeps of freed memory back to the system: tensors of a few MiB lie in that heap, and without this
    some of them stay for good."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc has it
    if trim is not None:
        trim(0)


def held_bytes(worker: Worker) -> int:
    """For ``Executor.call``: see `Worker.held_bytes`."""
    return worker.held_bytes


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes left) of every control group that limits memory."""
    for group in groups_around("memory", root):
        limit, used, cache = FILES[group.version]
        most, current = number(group.folder / limit), number(group.folder / used)
        if most is not None and current is not None and most < UNLIMITED_BYTES:
            yield most, most - current + numbers(group.folder / "memory.stat").get(cache, 0)
