"""Structured output: a grammar is compiled once, each sequence walks it with a matcher of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvloom.structured_outputs import GrammarSpec

__all__ = ["CompiledGrammar", "Grammar", "GrammarMatcher", "GrammarProblem", "GrammarSpec", "GrammarVocabulary"]


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """What a grammar library may know of the model's tokens: plain data, so that neither a worker nor the process in which a
    grammar is tried needs a tokenizer.

    Args:
        tokens: ``[V]`` the bytes that each token adds to the text. Empty for tokens that may never be chosen inside of a
            grammar: special ones, those that end a text, and ids that the tokenizer does not know.
    """

    tokens: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """V: tokens that the model knows."""
        return len(self.tokens)


class GrammarProblem(NamedTuple):
    """Something in a grammar that cannot be enforced: where (JSON pointer or offset), which keyword, why."""

    where: str
    keyword: str
    reason: str


class GrammarMatcher(ABC):
    """Position of one sequence in a grammar. Not shared; `fork` for beams."""

    @abstractmethod
    def fill_masks(self, masks: memoryview, draft_token_ids: Sequence[int]) -> None:
        """Write one bitmask row of ``ceil(V / 32)`` int32 words for the next token and for the position after each draft.

        Bit i % 32 of word i // 32 is 1 where the text may go on with token i. Ends are the core's: it asks `is_complete` and allows
        the tokens that end a text there, and only there. Does not move the matcher. Called while the model runs, in another thread
        than the other methods, never together with them.

        Args:
            masks: ``(1 + drafts) * ceil(V / 32)`` int32, C-contiguous; what is in there is anything.
            draft_token_ids: proposed tokens; rows after one that the grammar does not allow are all 0.

        Raises:
            RequestFailedError: the position is too complex.
        """

    @abstractmethod
    def advance(self, token_ids: Sequence[int]) -> None:
        """The sequence accepted these tokens. Raises `RequestFailedError` when the grammar does not allow them."""

    @abstractmethod
    def rollback(self, num_tokens: int) -> None:
        """Undo the last `num_tokens`."""

    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the output may end here."""

    @abstractmethod
    def fork(self) -> GrammarMatcher:
        """An independent matcher at the same position."""


class CompiledGrammar(ABC):
    """Immutable and shared between requests; cached by the core under a byte bound.

    Attributes:
        size_bytes: of what it holds, matchers not counted; an estimate is fine, 0 is not.
    """

    size_bytes: int

    @abstractmethod
    def matcher(self) -> GrammarMatcher:
        """A matcher at the start."""


class Grammar(ABC):
    """A grammar library. Registered with ``kvloom_register_grammars``; made once a process.

    A request's spec is first tried in a process of its own, which the core bounds in time and memory and kills: `validate`,
    `compile`, and the first mask. Only a spec that came through is compiled in the engine. So both must do the same work for the
    same spec, and must not depend on the engine's process.
    """

    @abstractmethod
    def __init__(self, vocabulary: GrammarVocabulary) -> None: ...

    @abstractmethod
    def validate(self, spec: GrammarSpec) -> list[GrammarProblem]:
        """Everything in `spec` that cannot be enforced, malformed parts included; empty when all can."""

    @abstractmethod
    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Raises `RequestValidationError` for what `validate` finds fault with."""
