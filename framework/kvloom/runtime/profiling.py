"""torch's profiler around the steps of a worker: one Chrome trace file from `start` to `stop`."""

from __future__ import annotations

import re
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch.profiler import profile, record_function

from kvloom.errors import ConfigError, EngineStateError, RequestValidationError

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

    def start(self, directory: Path, prefix: str) -> None:
        """Record from here on.

        Raises:
            EngineStateError: it is recording already.
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
        except OSError as error:
            raise ConfigError(f"profile_dir={str(directory)!r} cannot be made: {error}") from error
        self._path = directory / f"{prefix}rank{self._rank}-{time.time_ns()}.trace.json.gz"
        self._running = profile()  # of every kind of device that this torch can record
        self._running.start()

    def stop(self) -> Path:
        """Write the trace; its file.

        Raises:
            EngineStateError: it is not recording.
        """
        if self._running is None:
            raise EngineStateError("the profiler was not started; call start_profile() first")
        running, self._running = self._running, None
        running.stop()
        running.export_chrome_trace(str(self._path))
        return self._path

    def step(self, step_id: int) -> AbstractContextManager[object]:
        """A named span around a step."""
        return nullcontext() if self._running is None else record_function(f"step {step_id}")

    def close(self) -> None:
        """Forget what was recorded."""
        if self._running is not None:
            self._running.stop()
        self._running = None
