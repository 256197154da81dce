"""Decoding algorithms above single-token sampling: those that fork sequences (beam search), and draft proposers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from kvloom.interfaces.step import TokenLogprob


class Branching(NamedTuple):
    """What a decoder needs for one request.

    Fields:
        max_branches: most sequences that live at a time; the scheduler keeps so many places free for them.
        candidates_per_row: best next tokens that each of them wants after each step, at least 1.
        max_tokens: most output tokens of a sequence, at least 1; one that has them must not live on.
        num_results: how many finished sequences are given back, those with the largest scores.
        temperature: log-probabilities are of logits divided by it; 0 leaves the logits alone.
    """

    max_branches: int
    candidates_per_row: int
    max_tokens: int
    num_results: int
    temperature: float = 0.0


class Candidates(NamedTuple):
    """Best next tokens of one live sequence after a step, best first.

    Fields:
        branch: 0, 1, ...: what `Branch.parent` refers to. Live sequences are numbered as the last `Decision` listed them.
        token_ids: its output tokens so far.
        cumulative_logprob: sum of their log-probabilities.
        best: candidates, the most probable first.
    """

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
    """A sequence that ends.

    Fields:
        parent: the branch whose tokens it has.
        token_ids: what comes after them, possibly nothing.
        score: by which results are ordered, largest first; equal ones in the order in which they ended.
        cumulative_logprob: of all output tokens.
        reason: "stop" or "length".
    """

    parent: int
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

    The core owns blocks and forks; a decoder sees tokens and scores only. One instance an engine; what belongs to a request is in
    its state, which is replaced, not changed: `decide` returns the new one.
    """

    plugin_config: ClassVar[Any] = None
    """Set by the loader to the plugin's validated configuration."""

    def check(self, params: Any) -> None:
        """Refuse parameters that no prompt could make right.

        Called once a call, before its prompts, of which there may be none. Without it `start` says of each prompt what is wrong.

        Raises:
            RequestValidationError, RequestTypeError: parameters that it cannot serve.
        """

    @abstractmethod
    def start(self, params: Any, prompt_token_ids: Sequence[int], eos_token_ids: frozenset[int],
              room_tokens: int) -> tuple[Any, Branching]:
        """``(state, what the request needs)``, before anything is computed.

        Args:
            params: what the caller gave, of whatever type this decoder takes.
            eos_token_ids: tokens that end a text, whether or not the request heeds them.
            room_tokens: output tokens that fit after the prompt.

        Raises:
            RequestValidationError, RequestTypeError: parameters that it cannot serve.
        """

    @abstractmethod
    def decide(self, state: Any, candidates: Sequence[Candidates]) -> tuple[Any, Decision]:
        """Once every live branch has its candidates -> the new state and what lives on. At first there is one branch, the prompt.

        What it raises fails its request only.
        """


class Proposer(ABC):
    """Proposes draft tokens, which the model's own step verifies. Registered with ``kvloom_register_decoders`` too."""

    auxiliary_layers: ClassVar[tuple[int, ...]] = ()
    """Hidden states that it wants from the model (`ModelOutputs.auxiliary`)."""

    @abstractmethod
    def propose(self, token_ids: Sequence[Sequence[int]], max_draft_tokens: int, hidden: Any = None) -> list[tuple[int, ...]]:
        """Per sequence up to `max_draft_tokens` proposed successors, possibly none."""
