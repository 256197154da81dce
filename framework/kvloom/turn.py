"""Whose turn it is: an engine is used by one thread at a time, and never from inside itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kvloom.errors import RequestFailedError


class Turn:
    """Threads take turns: a step of one may serve the requests of all. A function, a tokenizer or an observer that the engine calls may
    not call the engine, which is in the middle of something."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread_id: int | None = None

    @contextmanager
    def take(self, what: str) -> Iterator[None]:
        """Wait for the turn, and have it in the block.

        Args:
            what: is done in it, for the error.

        Raises:
            RequestFailedError: this thread has it already.
        """
        if self._thread_id == threading.get_ident():
            raise RequestFailedError(f"{what} was called from inside the engine, by what the engine itself had called")
        with self._lock:
            self._thread_id = threading.get_ident()
            try:
                yield
            finally:
                self._thread_id = None

    @contextmanager
    def try_to_take(self) -> Iterator[bool]:
        """Whether the turn is free now; it is taken for the block then. For what must not wait, like the end of a generator."""
        if not self._lock.acquire(blocking=False):
            yield False
            return
        self._thread_id = threading.get_ident()
        try:
            yield True
        finally:
            self._thread_id = None
            self._lock.release()
