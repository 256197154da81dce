"""Whose turn it is: an engine is used by one thread at a time, and never from inside itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kvloom.errors import RequestFailedError

_INSIDE: ContextVar[tuple[object, ...]] = ContextVar("kvloom_turns", default=())
"""Turns that what runs now was called in. Threads that take their caller's context along, such as a worker call's with a time limit,
are inside too."""


class Turn:
    """Threads take turns: a step of one may serve the requests of all. A function, a tokenizer or an observer that the engine calls may
    not call the engine, which is in the middle of something."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: object | None = None  # another object each time, so that a thread that outlives a turn is not inside for ever

    @contextmanager
    def take(self, what: str) -> Iterator[None]:
        """Wait for the turn, and have it in the block.

        Args:
            what: is done in it, for the error.

        Raises:
            RequestFailedError: what has the turn asks for it.
        """
        if self._now is not None and self._now in _INSIDE.get():
            raise RequestFailedError(f"{what} was called from inside the engine, by what the engine itself had called")
        with self._lock, self._have():
            yield

    @contextmanager
    def try_to_take(self) -> Iterator[bool]:
        """Whether the turn is free now; it is taken for the block then. For what must not wait, like the end of a generator."""
        if not self._lock.acquire(blocking=False):
            yield False
            return
        try:
            with self._have():
                yield True
        finally:
            self._lock.release()

    @contextmanager
    def _have(self) -> Iterator[None]:
        before = _INSIDE.get()
        try:
            self._now = object()
            _INSIDE.set((*before, self._now))
            yield
        finally:
            _INSIDE.set(before)
            self._now = None
