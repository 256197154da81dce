"""Kernel calls: run at once, or recorded as a plan that runs again and again in one call.

A kernel is a C++ function that does one thread's part of its work, and a structure of arguments with a field ``rows``. A plan is a list
of such calls; the threads run all of them one after the other, with no Python between them, for as many rows as were recorded or fewer.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from kvloom_kernels.native import library


class NotRecordableError(Exception):
    """Why a step cannot be recorded, as a phrase."""


class Call(ctypes.Structure):
    """As step.cpp reads it."""

    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class Plan:
    """Recorded calls. What their pointers point to must live as long as it does: see `keep`.

    Args:
        rows: of the step that is recorded. Each call must work on a multiple of them, row after row.
        ranges: that the rows are cut into, by numbers that the calls read. A call on ranges works on all of them, of which some may be
            empty. None: each row is a range.
        computed_rows: of the rows, while it is recorded; None: all.
    """

    def __init__(self, rows: int, ranges: int | None = None, computed_rows: int | None = None) -> None:
        self.rows, self._ranges = rows, ranges
        self._computed_rows = rows if computed_rows is None else computed_rows
        self._arguments: list[Any] = []
        self._counted: list[tuple[Any, int]] = []  # arguments, and how often they have the rows of the step
        self._kernels: list[int] = []
        self._calls: ctypes.Array[Call] | None = None
        self._kept: list[Any] = []

    def __len__(self) -> int:
        return len(self._kernels)

    def add(self, kernel: int, arguments: Any, *, on_ranges: bool = False) -> None:
        """One more call; from now on its arguments say as many rows as are computed. Raises `NotRecordableError`."""
        if on_ranges and self._ranges is not None:
            if arguments.rows != self._ranges:
                raise NotRecordableError(f"a kernel works on {arguments.rows} ranges of a step of {self._ranges}")
        else:
            count, rest = divmod(arguments.rows, self.rows)
            if rest:
                raise NotRecordableError(f"a kernel works on {arguments.rows} rows of a step of {self.rows}")
            self._counted.append((arguments, count))
            arguments.rows = self._computed_rows * count
        self._kernels.append(kernel)
        self._arguments.append(arguments)
        self._calls = None

    def keep(self, *owners: Any) -> None:
        """Hold what owns memory that the calls use."""
        self._kept += owners

    def replay(self, rows: int | None = None) -> None:
        """Run all calls, in order, for the first `rows` rows; None: for all."""
        rows = self.rows if rows is None else rows
        if rows != self._computed_rows:
            self._computed_rows = rows
            for arguments, count in self._counted:
                arguments.rows = rows * count
        if self._calls is None:
            calls = [Call(k, ctypes.addressof(a)) for k, a in zip(self._kernels, self._arguments, strict=True)]
            self._calls = (Call * len(calls))(*calls)
        library().kvloom_run(self._calls, len(self._kernels), torch.get_num_threads())


class _Thread(threading.local):
    recording: Plan | None = None


_thread = _Thread()


@contextmanager
def recorded(plan: Plan) -> Iterator[None]:
    """Within the block every kernel call of this thread runs and is added to `plan`. Kernels are called through models of others,
    which pass no plan on."""
    before, _thread.recording = _thread.recording, plan
    try:
        yield
    finally:
        _thread.recording = before


@cache
def address(name: str) -> int:
    """Of a kernel."""
    found = ctypes.cast(getattr(library(), name), ctypes.c_void_p).value
    if found is None:
        raise AttributeError(name)
    return found


def run(name: str, arguments: ctypes.Structure, *, on_ranges: bool = False) -> None:
    """Run one kernel, whose ``rows`` may be ranges of rows: see `Plan`. Raises `NotRecordableError` within `recorded`."""
    kernel = address(name)
    if _thread.recording is not None:
        _thread.recording.add(kernel, arguments, on_ranges=on_ranges)
    library().kvloom_run(ctypes.byref(Call(kernel, ctypes.addressof(arguments))), 1, torch.get_num_threads())


def unrecorded(name: str) -> Callable[..., Any]:
    """A function of the library that is no part of a plan. Raises `NotRecordableError` within `recorded`."""
    if _thread.recording is not None:
        raise NotRecordableError(f"{name} cannot be recorded")
    function: Callable[..., Any] = getattr(library(), name)
    return function


def refuse_recording(what: str) -> None:
    """For kernels of other kinds, which no plan can hold. Raises `NotRecordableError` within `recorded`."""
    if _thread.recording is not None:
        raise NotRecordableError(f"{what} cannot be recorded")
