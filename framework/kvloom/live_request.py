"""A request while it runs: its sequences, their text, and the call it belongs to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvloom.core import Request
from kvloom.decoding import Decoding
from kvloom.errors import KvloomError
from kvloom.interfaces import Tokenizer
from kvloom.outputs import RequestOutput
from kvloom.params import PoolingParams, SamplingParams
from kvloom.pooling_outputs import PoolingRequestOutput
from kvloom.pooling_results import pooling_output, pooling_refusal
from kvloom.text.output import request_output, request_refusal
from kvloom.text.sequence_text import SequenceText

Params = SamplingParams | PoolingParams | Decoding
Output = RequestOutput | PoolingRequestOutput[Any]
OnText = Callable[[int, str], object]
"""``(completion index, new text)``."""


class MakeOutput(NamedTuple):
    """What callers get of one kind of request: ``ended`` of one that is over, ``refused`` of one that has no result."""

    ended: Callable[[LiveRequest, Tokenizer | None, KvloomError | None], Output]
    refused: Callable[[LiveRequest, KvloomError], Output]

    @classmethod
    def of(cls, params: Params) -> MakeOutput:
        """The kind that the caller's parameters say."""
        return cls(pooling_output, pooling_refusal) if isinstance(params, PoolingParams) else cls(request_output, request_refusal)


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
        output: makes its output.
        on_text: told of new text as it comes.
        texts: of its sequences to be, see `LiveSequence`.
        num_running: sequences that are not over.
    """

    request_id: str
    prompt: str | None
    place: int
    call: Call
    output: MakeOutput
    on_text: OnText | None = None
    texts: list[SequenceText | None] = field(default_factory=list)
    sequences: list[LiveSequence] = field(default_factory=list)
    num_running: int = 0


class Call:
    """The requests of one caller: what is pending, and the outputs that were not taken yet."""

    def __init__(self) -> None:
        self.pending: dict[int, LiveRequest] = {}
        self._done: deque[tuple[int, Output]] = deque()

    @property
    def num_unfinished(self) -> int:
        """Requests without an output."""
        return len(self.pending)

    @property
    def num_open(self) -> int:
        """Requests without an output, and outputs that were not taken."""
        return len(self.pending) + len(self._done)

    def deliver(self, place: int, output: Output) -> None:
        """A request ended, or was refused."""
        self.pending.pop(place, None)
        self._done.append((place, output))

    def take(self) -> Iterator[tuple[int, Any]]:
        """``(place, output)`` of what ended since the last time; the output's class goes with the parameters that were submitted."""
        while self._done:
            yield self._done.popleft()
