"""``bad_words``: texts that must not appear in the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import RequestValidationError
from kvloom.interfaces import LogitsProcessor, SequenceView, Stage, Tokenizer
from kvloom.params import SamplingParams
from kvloom_samplers.bias import check_vocabulary, flat


def spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Token ids of a word as it is, and with a space before it where that is as long and begins with another token."""
    bare = tuple(tokenizer.encode(word, add_special_tokens=False))
    spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
    return [bare, spaced] if bare and len(spaced) == len(bare) and spaced[0] != bare[0] else [bare]


@dataclass(slots=True)
class Forbidden:
    """One sequence: what may never come, what may not come after certain tokens, and the output so far.

    Args:
        always: ids of words of one token.
        phrases: words of several tokens.
    """

    always: np.ndarray
    phrases: tuple[tuple[int, ...], ...]
    output: list[int] = field(default_factory=list)

    def ids(self) -> np.ndarray:
        """What may not come now: the last token of each phrase whose other tokens the output ends with."""
        ends = [p[-1] for p in self.phrases if tuple(self.output[1 - len(p):]) == p[:-1]]
        return np.concatenate((self.always, ends)).astype(np.int64) if ends else self.always


class BadWords(LogitsProcessor):
    """Forbids the last token of a word where the output ends with the ones before it; the prompt does not count."""

    stage = Stage.MASK
    order = 1

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> list[tuple[int, ...]] | None:
        """Token ids of every word."""
        if not params.bad_words:
            return None
        if tokenizer is None:
            raise RequestValidationError("Unable to get tokenizer because skip_tokenizer_init is True: bad_words cannot do without; "
                                         "use logit_bias, or make the LLM without skip_tokenizer_init",
                                         "bad_words", params.bad_words)
        found = [ids for word in params.bad_words for ids in spellings(word, tokenizer)]
        if not all(found):
            raise RequestValidationError("a bad word has no tokens", "bad_words", params.bad_words)
        return found

    def new_state(self, parameters: Sequence[Sequence[int]], sequence: SequenceView) -> Forbidden:
        """See `LogitsProcessor.new_state`."""
        for ids in parameters:
            check_vocabulary("bad_words", ids, sequence)
        always = np.array(sorted({ids[0] for ids in parameters if len(ids) == 1}), np.int64)
        return Forbidden(always, tuple(tuple(ids) for ids in parameters if len(ids) > 1))

    def apply(self, logits: Tensor, states: Sequence[Forbidden]) -> Tensor:
        """See `LogitsProcessor.apply`."""
        logits[flat([state.ids() for state in states], logits)] = -torch.inf
        return logits

    def advance(self, state: Forbidden, token_ids: Sequence[int]) -> None:
        """See `LogitsProcessor.advance`."""
        state.output.extend(token_ids)

    def rollback(self, state: Forbidden, num_tokens: int) -> None:
        """See `LogitsProcessor.rollback`."""
        del state.output[len(state.output) - num_tokens:]
