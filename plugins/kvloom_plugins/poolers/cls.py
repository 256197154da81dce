"""CLS: the first token's hidden state, which an encoder of the BERT kind is trained to fill."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvloom.interfaces import Pooler
from kvloom.params import PoolingParams


class FirstPooler(Pooler):
    """The state is the row, once it was there."""

    def start(self, params: PoolingParams, token_ids: Sequence[int]) -> None:
        """See `Pooler.start`."""

    def update(self, state: Tensor | None, hidden: Tensor, first_position: int) -> Tensor | None:
        """See `Pooler.update`."""
        return state if first_position else hidden[0].clone()

    def finish(self, state: Tensor) -> Tensor:
        """See `Pooler.finish`: ``[H]``."""
        return state
