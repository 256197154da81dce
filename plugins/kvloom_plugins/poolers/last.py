"""LAST: the last token's hidden state, which in a decoder has seen the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvloom.interfaces import Pooler
from kvloom.params import PoolingParams


class LastPooler(Pooler):
    """The state is the row."""

    needs = "last"

    def start(self, params: PoolingParams, token_ids: Sequence[int]) -> None:
        """See `Pooler.start`."""

    def update(self, state: None, hidden: Tensor, first_position: int) -> Tensor:
        """See `Pooler.update`."""
        return hidden[-1].clone()

    def finish(self, state: Tensor) -> Tensor:
        """See `Pooler.finish`: ``[H]``."""
        return state
