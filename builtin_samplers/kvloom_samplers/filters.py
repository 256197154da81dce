"""Temperature and what is left to chance after it: min-p, top-k, top-p, in this order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvloom.interfaces import LogitsProcessor, SequenceView, Stage, Tokenizer
from kvloom.params import SamplingParams
from kvloom_kernels.sampling import divide, top_p
from kvloom_kernels.transfer import to_device


class NumberProcessor(LogitsProcessor):
    """A processor whose state is one number a sequence, which never changes."""

    def new_state(self, parameters: float, sequence: SequenceView) -> float:
        """See `LogitsProcessor.new_state`."""
        return parameters

    def fork(self, state: float) -> float:
        """See `LogitsProcessor.fork`."""
        return state

    @staticmethod
    def column(states: Sequence[float], logits: Tensor) -> Tensor:
        """``[r, 1]`` float32."""
        return to_device(np.array(states, np.float32), logits.device)[:, None]


class Temperature(NumberProcessor):
    """Divides logits. 1 changes nothing and is not asked for; greedy rows never get here."""

    stage = Stage.TEMPERATURE

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> float | None:
        """See `LogitsProcessor.parameters`."""
        return None if params.is_greedy or params.temperature == 1.0 else params.temperature

    def apply(self, logits: Tensor, states: Sequence[float]) -> Tensor:
        """See `LogitsProcessor.apply`."""
        return divide(logits, self.column(states, logits)[:, 0])


class Filter(NumberProcessor):
    """Sets logits to minus infinity; at least the best token is left."""

    stage = Stage.FILTER


class MinP(Filter):
    """Keeps tokens whose probability is at least ``min_p`` times the best one's (Nguyen et al., 2024)."""

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> float | None:
        """See `LogitsProcessor.parameters`."""
        return params.min_p or None

    def apply(self, logits: Tensor, states: Sequence[float]) -> Tensor:
        """See `LogitsProcessor.apply`. Probabilities are compared as logits: no softmax is needed."""
        best = logits.amax(-1, keepdim=True)
        return logits.masked_fill_(logits < best + self.column(states, logits).log(), -torch.inf)


class TopK(Filter):
    """Keeps the ``top_k`` best tokens, and those that tie with the last of them."""

    order = 1

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> int | None:
        """See `LogitsProcessor.parameters`."""
        return params.top_k if params.top_k > 0 else None

    def apply(self, logits: Tensor, states: Sequence[float]) -> Tensor:
        """See `LogitsProcessor.apply`."""
        kept = np.minimum(np.array(states, np.int64), logits.shape[1])
        best = logits.topk(int(kept.max()), dim=-1).values
        return logits.masked_fill_(logits < best.gather(1, to_device(kept - 1, logits.device)[:, None]), -torch.inf)


class TopP(Filter):
    """Keeps the smallest set of best tokens whose probabilities add up to ``top_p`` (Holtzman et al., 2019), ties included."""

    order = 2

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> float | None:
        """See `LogitsProcessor.parameters`."""
        return params.top_p if params.top_p < 1 else None

    def apply(self, logits: Tensor, states: Sequence[float]) -> Tensor:
        """See `LogitsProcessor.apply`."""
        return top_p(logits, self.column(states, logits)[:, 0])
