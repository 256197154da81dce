"""torch's profiler around the steps of a worker: one Chrome trace file from `start` to `stop`."""

from __future__ import annotations

import re
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from kvloom.errors import ConfigError, EngineStateError, RequestValidationError

ONE = threading.Lock()
"""torch has one profiler a process, whatever number of engines."""
PREFIX = re.compile(r"[A-Za-z0-9._-]{0,64}")


class WorkerProfiler:
    """Off until it is started, and then free: a step asks one attribute.

    Args:
        rank: part of the file names.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._running: profile | None = None
        self._path = Path()
        self._thread = threading.current_thread()

    def start(self, directory: Path, prefix: str) -> None:
        """Record from here on.

        Raises:
            EngineStateError: it is recording already, or another engine of this process, or somebody else in this thread.
            RequestValidationError: `prefix` is no part of a file name.
            ConfigError: the directory cannot be made.
        """
        if self._running is not None:
            raise EngineStateError("the profiler was started already; call stop_profile() first")
        if not PREFIX.fullmatch(prefix):
            raise RequestValidationError(f"profile_prefix={prefix!r} must be at most 64 of the characters A-Z a-z 0-9 . _ -",
                                         "profile_prefix", prefix)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a null character
            raise ConfigError(f"profile_dir={str(directory)!r} cannot be made: {error}") from error
        if not ONE.acquire(blocking=False):
            raise EngineStateError("another engine of this process is being profiled; call its stop_profile() first")
        self._path = directory / f"{prefix}rank{self._rank}-{time.time_ns()}.trace.json.gz"
        try:
            if torch._C._autograd._profiler_enabled():
                raise EngineStateError("torch's profiler is on in this thread already; end it first")
            running = profile()  # of every kind of device that this torch can record
            running.start()
        except BaseException:
            ONE.release()
            raise
        self._running, self._thread = running, threading.current_thread()

    def stop(self) -> Path:
        """Write the trace; its file.

        Raises:
            EngineStateError: it is not recording, or another thread started it: torch's profiler belongs to its thread, and the process
                would crash.
            ConfigError: the file cannot be written; what was recorded is lost.
        """
        if self._running is None:
            raise EngineStateError("the profiler was not started; call start_profile() first")
        if not self._thread.is_alive():
            self.close()
            raise EngineStateError("the thread in which the profiler was started has ended, and what it recorded with it")
        if self._thread is not threading.current_thread():
            raise EngineStateError(f"the profiler was started in the thread {self._thread.name!r}; call stop_profile() there")
        try:
            self._end(self._running).export_chrome_trace(str(self._path))
        except OSError as error:
            raise ConfigError(f"profile_dir={str(self._path.parent)!r}: the trace cannot be written: {error}") from error
        return self._path

    def _end(self, running: profile) -> profile:
        self._running = None
        try:
            if self._thread is threading.current_thread():
                running.stop()
        finally:
            ONE.release()
        return running

    def step(self, step_id: int) -> AbstractContextManager[object]:
        """A named span around a step."""
        return nullcontext() if self._running is None else record_function(f"step {step_id}")

    def close(self) -> None:
        """Forget what was recorded."""
        if self._running is not None:
            self._end(self._running)
