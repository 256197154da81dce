"""Ctrl-C between steps: what keeps an engine's books is not interrupted in the middle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held() -> Iterator[None]:
    """A block in which Ctrl-C is heard at the end only; a second one at once, for a block that does not end.

    Whoever else handles SIGINT (a notebook, asyncio) still does. Python runs such handlers in the main thread, so in others there is
    nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread() or not callable(before := signal.getsignal(signal.SIGINT)):
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append((number, frame))
        if len(heard) > 1:
            heard.clear()
            before(number, frame)

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        found = signal.signal(signal.SIGINT, before)
        if found is not hear:  # somebody in the block wanted another one
            signal.signal(signal.SIGINT, found)
        if heard:
            before(*heard[0])
