"""What a request adds to or forbids in its logits by token id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import RequestValidationError
from kvloom.interfaces import LogitsProcessor, SequenceView, Stage, Tokenizer
from kvloom.params import SamplingParams
from kvloom_kernels.transfer import to_device


def flat(ids: Sequence[np.ndarray], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Row and token of every id of every row, for indexing ``logits [r, V]``."""
    rows = np.repeat(np.arange(len(ids)), [len(i) for i in ids])
    return to_device(rows, logits.device), to_device(np.concatenate(ids), logits.device)


def check_vocabulary(name: str, ids: Sequence[int], sequence: SequenceView) -> np.ndarray:
    """Ids as an array. Raises `RequestValidationError` for one that the model does not have."""
    bad = [i for i in ids if not 0 <= i < sequence.vocab_size]
    if bad:
        raise RequestValidationError(f"{name} has the token id {bad[0]}, which is out of vocabulary: ids are 0 to "
                                     f"{sequence.vocab_size - 1}", name, bad[0])
    return np.array(ids, np.int64)


class AllowedTokens(LogitsProcessor):
    """``allowed_token_ids``: everything else is forbidden."""

    stage = Stage.MASK

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> Sequence[int] | None:
        """See `LogitsProcessor.parameters`."""
        return params.allowed_token_ids

    def new_state(self, parameters: Sequence[int], sequence: SequenceView) -> np.ndarray:
        """The ids."""
        return check_vocabulary("allowed_token_ids", parameters, sequence)

    def apply(self, logits: Tensor, states: Sequence[np.ndarray]) -> Tensor:
        """See `LogitsProcessor.apply`."""
        where = flat(states, logits)
        kept = torch.full_like(logits, -torch.inf)
        kept[where] = logits[where]
        return kept


class LogitBias(LogitsProcessor):
    """``logit_bias``: numbers that are added."""

    stage = Stage.BIAS
    order = 1

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> Mapping[int, float] | None:
        """See `LogitsProcessor.parameters`."""
        return params.logit_bias or None

    def new_state(self, parameters: Mapping[int, float], sequence: SequenceView) -> tuple[np.ndarray, np.ndarray]:
        """Ids and what is added to each."""
        ids = check_vocabulary("logit_bias", list(parameters), sequence)
        return ids, np.array(list(parameters.values()), np.float32)

    def apply(self, logits: Tensor, states: Sequence[tuple[np.ndarray, np.ndarray]]) -> Tensor:
        """See `LogitsProcessor.apply`."""
        added = to_device(np.concatenate([bias for _, bias in states]), logits.device)
        return logits.index_put_(flat([ids for ids, _ in states], logits), added, accumulate=True)


@dataclass(slots=True)
class Waiting:
    """A sequence that may not end yet: how many tokens it still needs, and which ids would end it."""

    missing_tokens: int
    end_token_ids: np.ndarray


class MinTokens(LogitsProcessor):
    """``min_tokens``: end-of-text and stop tokens are forbidden until the output is long enough."""

    stage = Stage.BIAS

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> tuple[int, tuple[int, ...]] | None:
        """See `LogitsProcessor.parameters`."""
        return (params.min_tokens, tuple(params.stop_token_ids or ())) if params.min_tokens else None

    def new_state(self, parameters: tuple[int, tuple[int, ...]], sequence: SequenceView) -> Waiting:
        """See `LogitsProcessor.new_state`."""
        ids = {i for i in (*parameters[1], *sequence.end_token_ids) if i < sequence.vocab_size}
        return Waiting(parameters[0], np.array(sorted(ids), np.int64))

    def apply(self, logits: Tensor, states: Sequence[Waiting]) -> Tensor:
        """See `LogitsProcessor.apply`."""
        nothing = np.empty(0, np.int64)
        logits[flat([s.end_token_ids if s.missing_tokens > 0 else nothing for s in states], logits)] = -torch.inf
        return logits

    def advance(self, state: Waiting, token_ids: Sequence[int]) -> None:
        """See `LogitsProcessor.advance`."""
        state.missing_tokens -= len(token_ids)

    def rollback(self, state: Waiting, num_tokens: int) -> None:
        """See `LogitsProcessor.rollback`."""
        state.missing_tokens += num_tokens
