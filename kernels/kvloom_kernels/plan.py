"""Kernel calls: run at once, or recorded as a plan that runs again and again in one call.

A kernel is a C++ function that does one thread's part of its work, and a structure of arguments. A plan is a list of such calls; all of
them run in one parallel region, with no Python between them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from kvloom_kernels.native import library


class Call(ctypes.Structure):
    """As step.cpp reads it."""

    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class Plan:
    """Recorded calls. What their pointers point to must live as long as it does: see `keep`."""

    def __init__(self) -> None:
        self._arguments: list[ctypes.Structure] = []
        self._kernels: list[int] = []
        self._calls: ctypes.Array[Call] | None = None
        self._kept: list[Any] = []

    def __len__(self) -> int:
        return len(self._kernels)

    def add(self, kernel: int, arguments: ctypes.Structure) -> None:
        """One more call."""
        self._kernels.append(kernel)
        self._arguments.append(arguments)
        self._calls = None

    def keep(self, *owners: Any) -> None:
        """Hold what owns memory that the calls use."""
        self._kept += owners

    def replay(self) -> None:
        """Run all calls, in order."""
        if self._calls is None:
            calls = [Call(k, ctypes.addressof(a)) for k, a in zip(self._kernels, self._arguments, strict=True)]
            self._calls = (Call * len(calls))(*calls)
        library().kvloom_run(self._calls, len(self._kernels), torch.get_num_threads())


_recording: Plan | None = None


@contextmanager
def recorded(plan: Plan) -> Iterator[None]:
    """Within the block every kernel call runs and is added to `plan`."""
    global _recording  # kernels are called through models of others, which pass no plan on
    before, _recording = _recording, plan
    try:
        yield
    finally:
        _recording = before


@cache
def address(name: str) -> int:
    """Of a kernel."""
    found = ctypes.cast(getattr(library(), name), ctypes.c_void_p).value
    if found is None:
        raise AttributeError(name)
    return found


def run(name: str, arguments: ctypes.Structure) -> None:
    """Run one kernel."""
    kernel = address(name)
    if _recording is not None:
        _recording.add(kernel, arguments)
    library().kvloom_run(ctypes.byref(Call(kernel, ctypes.addressof(arguments))), 1, torch.get_num_threads())
