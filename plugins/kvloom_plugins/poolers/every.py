"""ALL: every token's hidden state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvloom.interfaces import Pooler
from kvloom.params import PoolingParams


class EveryTokenPooler(Pooler):
    """The state is the rows so far, chunk by chunk."""

    gives_rows = True

    def start(self, params: PoolingParams, token_ids: Sequence[int]) -> tuple[Tensor, ...]:
        """See `Pooler.start`."""
        return ()

    def update(self, state: tuple[Tensor, ...], hidden: Tensor, first_position: int) -> tuple[Tensor, ...]:
        """See `Pooler.update`."""
        return (*state, hidden.clone())

    def finish(self, state: tuple[Tensor, ...]) -> Tensor:
        """See `Pooler.finish`: ``[tokens, H]``."""
        return torch.cat(state)
