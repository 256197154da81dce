"""A program of ours that does foreign work under limits: one JSON object a line goes in, one comes out, and it is killed when it
takes too long or too much."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvloom.interrupts import held


class LimitError(Exception):
    """The program broke a limit; the message is a phrase."""


class LimitedProcess:
    """Starts with the first question, and again after it had to be killed. One question at a time.

    Args:
        program: its file; it is called with the memory limit as its argument and bounds itself.
        memory_limit_bytes: what the work may take beyond the program itself.
        start_limit_s: for the answer to the first question of each process.
    """

    def __init__(self, program: Path, memory_limit_bytes: int, start_limit_s: float) -> None:
        self._command = [sys.executable, "-P", str(program), str(memory_limit_bytes)]
        self._start_limit_s = start_limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None

    @property
    def is_running(self) -> bool:
        """Whether there is a process that the next question goes to. One that somebody else ended is forgotten."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        return self._process is not None

    def start(self, first: Mapping[str, Any]) -> dict[str, Any]:
        """Start it and ask its first question. Raises `LimitError`."""
        try:
            with held():  # or a process is left that nobody knows
                self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603  (our file)
                self._end = weakref.finalize(self, _end, self._process)  # also when nobody calls close
        except BaseException:
            self.close()  # the next question must not be the first that it is asked
            raise
        return self.ask(json.dumps(first).encode() + b"\n", self._start_limit_s)

    def ask(self, line: bytes, limit_s: float) -> dict[str, Any]:
        """The answer to one line. Raises `LimitError`; the process is ended then."""
        if self._process is None:
            raise LimitError("it was not started")
        try:
            answer = _exchange(self._process, line, limit_s)
        except BaseException:  # also Ctrl-C: what it would answer belongs to nobody
            self.close()
            raise
        if answer is None:
            self.close()
            raise LimitError(f"it took longer than {limit_s:g} s and was stopped")
        if not answer.endswith(b"\n"):
            self.close()
            raise LimitError("it needs too much memory or recursion: its process ended")
        out: dict[str, Any] = json.loads(answer)
        return out

    def close(self) -> None:
        """End the process. Calling it twice is fine."""
        self._process = None
        if self._end is not None:
            self._end()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _exchange(process: subprocess.Popen[bytes], data: bytes, limit_s: float) -> bytes | None:
    """Write a line and read one, without waiting on either side longer than the limit.

    Returns:
        The answer; without its line break when the process ended; None when the time was up.
    """
    deadline_s = time.monotonic() + limit_s
    if process.stdin is None or process.stdout is None:
        return b""
    to, back = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(to, False)
    os.set_blocking(back, False)
    left, answer = memoryview(data), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(to, selectors.EVENT_WRITE)
        selector.register(back, selectors.EVENT_READ)
        while not answer.endswith(b"\n"):
            ready = selector.select(max(0.0, deadline_s - time.monotonic()))
            if not ready:
                return None
            for key, _ in ready:
                if key.fd == back:
                    piece = os.read(back, 2**20)
                    if not piece:
                        return bytes(answer)
                    answer += piece
                else:
                    try:
                        left = left[os.write(to, left):]
                    except BrokenPipeError:
                        return b""
                    if not left:
                        selector.unregister(to)
    return bytes(answer)
