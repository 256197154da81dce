"""Decoding algorithms above single-token sampling: those that fork sequences (beam search), and draft proposers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from kvloom.interfaces.step import TokenLogprob


class Candidates(NamedTuple):
    """Best next tokens of one live sequence after a step, best first; its `branch` is what `Decision.live` refers to."""

    branch: int
    token_ids: tuple[int, ...]
    cumulative_logprob: float
    best: tuple[TokenLogprob, ...]


class Branch(NamedTuple):
    """A sequence that goes on: the branch it continues, and its next token. Several may continue one: its blocks are shared."""

    parent: int
    token_id: int
    logprob: float


class FinishedBranch(NamedTuple):
    """A sequence that ended: output tokens, score by which results are ordered, reason ("stop" or "length")."""

    token_ids: tuple[int, ...]
    score: float
    cumulative_logprob: float
    reason: str


class Decision(NamedTuple):
    """What happens next. Branches of the step that nothing continues are freed; no `live` branch ends the request."""

    live: tuple[Branch, ...]
    finished: tuple[FinishedBranch, ...] = ()


class Decoder(ABC):
    """Decides how one request's sequences branch. Registered with ``kvloom_register_decoders``.

    The core owns blocks and forks; a decoder sees tokens and scores only. Its state belongs to one request and is replaced, not
    changed: `decide` returns the new one, so a step can be repeated.
    """

    candidates_per_row: ClassVar[int] = 0
    """Candidates that each row must return; 0: `start` says it."""

    @abstractmethod
    def start(self, params: Any, prompt_token_ids: Sequence[int], eos_token_ids: frozenset[int]) -> tuple[Any, int]:
        """``(state, candidates per row)``. Raises `RequestValidationError` for parameters it cannot serve."""

    @abstractmethod
    def decide(self, state: Any, candidates: Sequence[Candidates]) -> tuple[Any, Decision]:
        """After each committed step: every live branch's candidates -> the new state and what lives on."""


class Proposer(ABC):
    """Proposes draft tokens, which the model's own step verifies. Registered with ``kvloom_register_decoders`` too."""

    auxiliary_layers: ClassVar[tuple[int, ...]] = ()
    """Hidden states that it wants from the model (`ModelOutputs.auxiliary`)."""

    @abstractmethod
    def propose(self, token_ids: Sequence[Sequence[int]], max_draft_tokens: int, hidden: Any = None) -> list[tuple[int, ...]]:
        """Per sequence up to `max_draft_tokens` proposed successors, possibly none."""
