"""Temperature and what is left to chance after it: min-p, top-k, top-p, in this order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvloom.interfaces import LogitsProcessor, SequenceView, Stage
from kvloom.params import SamplingParams

FIRST_CANDIDATES = 256
"""Tokens that top-p looks at first. Few distributions of a trained model need more; those that do are sorted whole."""


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
        return torch.tensor(states, dtype=torch.float32, device=logits.device)[:, None]


class Temperature(NumberProcessor):
    """Divides logits. 1 changes nothing and is not asked for; greedy rows never get here."""

    stage = Stage.TEMPERATURE

    @classmethod
    def parameters(cls, params: SamplingParams) -> float | None:
        """See `LogitsProcessor.parameters`."""
        return None if params.is_greedy or params.temperature == 1.0 else params.temperature

    def apply(self, logits: Tensor, states: Sequence[float]) -> Tensor:
        """See `LogitsProcessor.apply`."""
        return logits.div_(self.column(states, logits))


class Filter(NumberProcessor):
    """Sets logits to minus infinity; at least the best token is left."""

    stage = Stage.FILTER


class MinP(Filter):
    """Keeps tokens whose probability is at least ``min_p`` times the best one's (Nguyen et al., 2024)."""

    @classmethod
    def parameters(cls, params: SamplingParams) -> float | None:
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
    def parameters(cls, params: SamplingParams) -> int | None:
        """See `LogitsProcessor.parameters`."""
        return params.top_k if params.top_k > 0 else None

    def apply(self, logits: Tensor, states: Sequence[float]) -> Tensor:
        """See `LogitsProcessor.apply`."""
        kept = torch.tensor(states, dtype=torch.int64, device=logits.device).clamp_(max=logits.shape[1])
        best = logits.topk(int(kept.max()), dim=-1).values
        return logits.masked_fill_(logits < best.gather(1, kept[:, None] - 1), -torch.inf)


class TopP(Filter):
    """Keeps the smallest set of best tokens whose probabilities add up to ``top_p`` (Holtzman et al., 2019), ties included."""

    order = 2

    @classmethod
    def parameters(cls, params: SamplingParams) -> float | None:
        """See `LogitsProcessor.parameters`."""
        return params.top_p if params.top_p < 1 else None

    def apply(self, logits: Tensor, states: Sequence[float]) -> Tensor:
        """See `LogitsProcessor.apply`. Looks at the best `FIRST_CANDIDATES`; only rows that need more are sorted whole."""
        wanted = self.column(states, logits)
        total = logits.logsumexp(-1, keepdim=True)
        threshold, enough = self._threshold(logits, min(FIRST_CANDIDATES, logits.shape[1]), total, wanted)
        rest = torch.nonzero(~enough).flatten()
        if len(rest):
            threshold[rest] = self._threshold(logits[rest], logits.shape[1], total[rest], wanted[rest])[0]
        return logits.masked_fill_(logits < threshold, -torch.inf)

    @staticmethod
    def _threshold(logits: Tensor, candidates: int, total: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The last kept token's logit ``[r, 1]``, and whether the candidates held it ``[r]``."""
        best = logits.topk(candidates, dim=-1).values
        mass = (best - total).exp_().cumsum(-1)
        before = mass.roll(1, dims=-1)
        before[:, 0] = 0
        last = (before < wanted).sum(-1, keepdim=True).clamp_(min=1) - 1  # a token is kept while the mass before it is too little
        return best.gather(1, last), (mass[:, -1:] >= wanted)[:, 0] | (candidates == logits.shape[1])
