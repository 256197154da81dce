"""Penalties for tokens that were there before: repetition (prompt and output), then frequency and presence (output)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.interfaces import LogitsProcessor, SequenceView, Stage, Tokenizer
from kvloom.params import SamplingParams
from kvloom_kernels.transfer import to_device
from kvloom_samplers.bias import flat


class Amounts(NamedTuple):
    """How much each penalty takes."""

    repetition: float
    frequency: float
    presence: float


class SeenTokens:
    """Distinct tokens of one sequence and how often each is in its output: two arrays that grow, so nothing is rebuilt in a step."""

    def __init__(self, amounts: Amounts, prompt: Sequence[int]) -> None:
        self.amounts = amounts
        distinct = dict.fromkeys(prompt)
        self._prompt_ids = len(distinct)
        self._output: list[int] = []
        self._place = {token_id: i for i, token_id in enumerate(distinct)}
        self._ids: np.ndarray = np.array([*distinct, *[0] * 64], np.int64)
        self._counts: np.ndarray = np.zeros(len(self._ids), np.float32)

    @property
    def ids(self) -> np.ndarray:
        """Distinct ids."""
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> np.ndarray:
        """How often each is in the output."""
        return self._counts[: len(self._place)]

    @property
    def seen(self) -> np.ndarray:
        """Which of them are in the prompt or the output; a rollback may have taken the last one away."""
        return (np.arange(len(self._place)) < self._prompt_ids) | (self.counts > 0)

    def append(self, token_id: int) -> None:
        """One more output token."""
        self._output.append(token_id)
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[place] = token_id
        self._counts[place] += 1

    def pop(self) -> None:
        """The last output token does not count after all."""
        self._counts[self._place[self._output.pop()]] -= 1


class Penalties(LogitsProcessor):
    """All three, in the order repetition, frequency, presence. Only logits of tokens that were there are touched."""

    stage = Stage.PENALTY

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> Amounts | None:
        """See `LogitsProcessor.parameters`."""
        amounts = Amounts(params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        return None if amounts == Amounts(1.0, 0.0, 0.0) else amounts

    def new_state(self, parameters: Amounts, sequence: SequenceView) -> SeenTokens:
        """See `LogitsProcessor.new_state`. Without a repetition penalty the prompt does not matter."""
        amounts = Amounts(*parameters)
        return SeenTokens(amounts, sequence.prompt_token_ids if amounts.repetition != 1.0 else ())

    def apply(self, logits: Tensor, states: Sequence[SeenTokens]) -> Tensor:
        """See `LogitsProcessor.apply`."""
        lengths = [len(s.ids) for s in states]
        if not sum(lengths):
            return logits
        where = flat([s.ids for s in states], logits)
        counts = np.concatenate([s.counts for s in states])
        amounts = np.repeat(np.array([s.amounts for s in states], np.float32), lengths, axis=0)
        taken = to_device(amounts[:, 1] * counts + amounts[:, 2] * (counts > 0), logits.device)
        seen = np.concatenate([s.seen for s in states])
        repetition = to_device(np.where(seen, amounts[:, 0], np.float32(1)), logits.device)
        values = logits[where]
        logits[where] = torch.where(values > 0, values / repetition, values * repetition) - taken
        return logits

    def advance(self, state: SeenTokens, token_ids: Sequence[int]) -> None:
        """See `LogitsProcessor.advance`."""
        for token_id in token_ids:
            state.append(token_id)

    def rollback(self, state: SeenTokens, num_tokens: int) -> None:
        """See `LogitsProcessor.rollback`."""
        for _ in range(num_tokens):
            state.pop()
