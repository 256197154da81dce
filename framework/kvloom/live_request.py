"""A request while it runs: its sequences, their text, and the call it belongs to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvloom.core import Request
from kvloom.outputs import RequestOutput
from kvloom.text.sequence_text import SequenceText

OnText = Callable[[int, str], object]
"""``(completion index, new text)``."""


@dataclass(slots=True)
class LiveSequence:
    """One completion being made.

    Args:
        text: followed token by token only where somebody needs it before the end.
        is_over: it ended, and its text was read to the end.
    """

    request: Request
    text: SequenceText | None
    is_over: bool = False


@dataclass(slots=True)
class LiveRequest:
    """A request in the engine.

    Args:
        request_id: its public id.
        prompt: its text, if there is one.
        place: which of its call's prompts it is.
        call: which call it belongs to.
        on_text: told of new text as it comes.
        texts: of its sequences to be, see `LiveSequence`.
        num_running: sequences that are not over.
    """

    request_id: str
    prompt: str | None
    place: int
    call: Call
    on_text: OnText | None = None
    texts: list[SequenceText | None] = field(default_factory=list)
    sequences: list[LiveSequence] = field(default_factory=list)
    num_running: int = 0


class Call:
    """The requests of one caller: what is pending, and the outputs that were not taken yet."""

    def __init__(self) -> None:
        self.pending: dict[int, LiveRequest] = {}
        self._done: deque[tuple[int, RequestOutput]] = deque()

    @property
    def num_unfinished(self) -> int:
        """Requests without an output."""
        return len(self.pending)

    @property
    def num_open(self) -> int:
        """Requests without an output, and outputs that were not taken."""
        return len(self.pending) + len(self._done)

    def deliver(self, place: int, output: RequestOutput) -> None:
        """A request ended, or was refused."""
        self.pending.pop(place, None)
        self._done.append((place, output))

    def take(self) -> Iterator[tuple[int, RequestOutput]]:
        """``(place, output)`` of what ended since the last time."""
        while self._done:
            yield self._done.popleft()
