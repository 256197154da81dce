"""MEAN: the mean over all tokens' hidden states, special tokens included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvloom.interfaces import Pooler
from kvloom.params import PoolingParams


class Sum(NamedTuple):
    """``total [H]`` of `num_rows` rows, float32."""

    total: Tensor | None
    num_rows: int


class MeanPooler(Pooler):
    """Sums chunk by chunk, in float32."""

    def start(self, params: PoolingParams, token_ids: Sequence[int]) -> Sum:
        """See `Pooler.start`."""
        return Sum(None, 0)

    def update(self, state: Sum, hidden: Tensor, first_position: int) -> Sum:
        """See `Pooler.update`."""
        total = hidden.sum(0, dtype=torch.float32)
        return Sum(total if state.total is None else state.total + total, state.num_rows + len(hidden))

    def finish(self, state: Sum) -> Tensor:
        """See `Pooler.finish`: ``[H]``."""
        if state.total is None:
            raise ValueError("no hidden state came")
        return state.total / state.num_rows
