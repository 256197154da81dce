"""Grammars on the worker: compiled once, a matcher a sequence, masks of a step filled while the model runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import RequestError, RequestFailedError
from kvloom.interfaces.grammar import CompiledGrammar, Grammar, GrammarMatcher, GrammarSpec, GrammarVocabulary
from kvloom.interfaces.step import NewSequence
from kvloom_kernels.bitmask import apply_bitmask
from kvloom_kernels.transfer import to_device

CACHE_BYTES = 2**26
"""Of compiled grammars that no sequence may be using any more."""
WORD_BITS = 32
Mask = np.ndarray[Any, np.dtype[np.int32]]


class SequenceGrammar:
    """One sequence's way through its grammar. The library knows texts; where an output may end, and with which tokens, is decided here.

    Args:
        matcher: at the start.
        ends: tokens that may end the output where it is complete.
        last_ends: those that may only where it can't go on (``ignore_eos``).
        texts: ``[ceil(V / 32)]`` the tokens that have a text: no other may stand inside of an output.
        who: whom to name when it fails.
    """

    def __init__(self, matcher: GrammarMatcher, ends: Sequence[int], last_ends: Sequence[int], texts: Mask, who: str) -> None:
        self._matcher, self._ends, self._last_ends, self._texts, self._who = matcher, ends, last_ends, texts, who

    @property
    def num_words(self) -> int:
        """Of a mask."""
        return len(self._texts)

    def fill(self, mask: Mask) -> int | None:
        """Write the next token's mask ``[ceil(V / 32)]``.

        Returns:
            The token that ends the output, when nothing else is allowed.

        Raises:
            RequestFailedError: nothing is allowed, or the library raised.
        """
        try:
            self._matcher.fill_masks(memoryview(mask.data), ())
            is_complete = self._matcher.is_complete()
        except Exception as error:
            raise self._failure(error) from error
        mask &= self._texts
        goes_on = bool(mask.any())
        if not goes_on and not is_complete:
            raise RequestFailedError(f"{self._who} allows no token of this vocabulary here")
        ends = self._ends if goes_on else (*self._last_ends, *self._ends)
        if not goes_on and not ends:
            raise RequestFailedError("the output is complete, but there is no end token: name a special one in stop_token_ids")
        if is_complete:
            _allow(mask, ends)
        return None if goes_on else ends[0]

    def advance(self, token_ids: Sequence[int]) -> None:
        """The sequence accepted these tokens. Raises `RequestFailedError`."""
        texts = [i for i in token_ids if i not in self._ends and i not in self._last_ends]
        try:
            self._matcher.advance(texts)
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> RequestFailedError:
        reason = str(error) if isinstance(error, RequestError) else f"raised {type(error).__name__}: {error}"
        return RequestFailedError(f"{self._who}: {reason}")


def _allow(mask: Mask, token_ids: Sequence[int]) -> None:
    words = mask.view(np.uint32)
    for i in token_ids:
        words[i // WORD_BITS] |= np.uint32(1 << i % WORD_BITS)


class GrammarFactory:
    """Makes the grammars of sequences. The library and its vocabulary are made with the first one.

    Args:
        name: whom to name when it fails.
        make: makes the library.
        cache_bytes: bound of the compiled grammars that are kept.
    """

    def __init__(self, name: str, make: Callable[[GrammarVocabulary], Grammar], make_vocabulary: Callable[[], GrammarVocabulary],
                 cache_bytes: int = CACHE_BYTES) -> None:
        self._name, self._make, self._make_vocabulary, self._cache_bytes = name, make, make_vocabulary, cache_bytes
        self._library: Grammar | None = None
        self._tokens: tuple[bytes, ...] = ()
        self._texts: Mask = np.empty(0, np.int32)
        self._compiled: OrderedDict[GrammarSpec, CompiledGrammar] = OrderedDict()
        self.cached_bytes = 0

    def start(self, new: NewSequence) -> SequenceGrammar | None:
        """The grammar of a sequence that comes or resumes, where its output stands; None when it has none.

        Raises:
            RequestError: it cannot be compiled, or does not allow what is there.
        """
        if new.grammar is None or new.sampling is None:
            return None
        who = f"the grammar backend {self._name}"
        try:
            matcher = self._compile(new.grammar).matcher()
        except RequestError:
            raise
        except Exception as error:
            raise RequestFailedError(f"{who} raised {type(error).__name__}: {error}") from error
        stops = tuple(i for i in new.sampling.stop_token_ids or () if not self._tokens[i])
        known = tuple(i for i in new.end_token_ids if i < len(self._tokens))
        ends, last_ends = ((), known) if new.sampling.ignore_eos else (known, ())
        grammar = SequenceGrammar(matcher, (*ends, *(i for i in stops if i not in ends)), last_ends, self._texts, who)
        grammar.advance(new.token_ids[new.prompt_tokens:])
        return grammar

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar:
        found = self._compiled.get(spec)
        if found is not None:
            self._compiled.move_to_end(spec)
            return found
        if self._library is None:
            vocabulary = self._make_vocabulary()
            self._library, self._tokens = self._make(vocabulary), vocabulary.tokens
            self._texts = np.zeros(-(-vocabulary.size // WORD_BITS), np.int32)
            _allow(self._texts, [i for i, token in enumerate(vocabulary.tokens) if token])
        compiled = self._compiled[spec] = self._library.compile(spec)
        self.cached_bytes += compiled.size_bytes
        while self.cached_bytes > self._cache_bytes:
            self.cached_bytes -= self._compiled.popitem(last=False)[1].size_bytes
        return compiled


@dataclass(slots=True)
class StepMasks:
    """The masks of a step's rows that have a grammar.

    Args:
        rows: ``[g]`` int64, which of the sampled rows.
        masks: ``[g, ceil(V / 32)]`` int32. All ones where a row failed.
        forced: row -> the only token that is allowed, which ends the output.
        failed: row -> why.
    """

    rows: np.ndarray[Any, Any]
    masks: Mask
    forced: Mapping[int, int]
    failed: Mapping[int, RequestError]

    def apply(self, logits: Tensor) -> None:
        """Forbid in ``logits [S, V]``, in place, what the masks do not allow."""
        device = logits.device
        apply_bitmask(logits, to_device(self.masks, device), to_device(self.rows, device))

    def force(self, logits: Tensor) -> None:
        """Where an output cannot go on it ends, whatever processors made of ``logits [S, V]``: ``min_tokens`` forbids its end."""
        for row, token_id in self.forced.items():
            logits[row] = -torch.inf
            logits[row, token_id] = 0.0


class MaskFiller:
    """Fills the masks of a step in a thread of its own, while the model runs."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, grammars: Sequence[SequenceGrammar | None]) -> Future[StepMasks] | None:
        """Start on the rows that are to be sampled; None when no row has a grammar."""
        asking = {row: grammar for row, grammar in enumerate(grammars) if grammar is not None}
        if not asking:
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "kvloom-grammars")
        return self._thread.submit(_fill, asking)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown()
        self._thread = None


def _fill(asking: Mapping[int, SequenceGrammar]) -> StepMasks:
    masks: Mask = np.empty((len(asking), next(iter(asking.values())).num_words), np.int32)
    forced: dict[int, int] = {}
    failed: dict[int, RequestError] = {}
    for (row, grammar), mask in zip(asking.items(), masks, strict=True):
        try:
            only = grammar.fill(mask)
        except RequestError as error:
            mask[:] = -1
            failed[row] = error
        else:
            if only is not None:
                forced[row] = only
    return StepMasks(np.array(list(asking)), masks, forced, failed)
