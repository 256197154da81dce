"""Structured output: a grammar is compiled once, each sequence walks it with a matcher of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from kvloom.interfaces.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What the output must be: a JSON Schema, any JSON object, a regular expression, a choice (a JSON list), an EBNF grammar."""

    kind: Literal["json", "json_object", "regex", "choice", "grammar"]
    text: str
    whitespace: str | None = None


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

        Bit i of word i // 32 is 1 where the token is allowed. Does not move the matcher. Called while the model runs.
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
    """Immutable and shared between requests; cached by the core under a byte bound."""

    size_bytes: int

    @abstractmethod
    def matcher(self) -> GrammarMatcher:
        """A matcher at the start."""


class Grammar(ABC):
    """A grammar library. Registered with ``kvloom_register_grammars``; made once with the engine's tokenizer.

    The core calls `compile` under time and memory limits and may kill it: it must not hold locks of the engine.
    """

    @abstractmethod
    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None: ...

    @abstractmethod
    def validate(self, spec: GrammarSpec) -> list[GrammarProblem]:
        """Everything in `spec` that cannot be enforced; empty when it can. Runs at admission."""

    @abstractmethod
    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Raises `RequestValidationError` for a grammar that is malformed."""
