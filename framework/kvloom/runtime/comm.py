"""Collectives of a group of one."""

from __future__ import annotations

from torch import Tensor

from kvloom.interfaces.comm import Comm


class LocalComm(Comm):
    """A tensor-parallel group of one rank: every collective returns its input."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Comm`."""
        return x

    def all_gather(self, x: Tensor, axis: int) -> Tensor:
        """See `Comm`."""
        return x

    def all_to_all(self, x: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """See `Comm`."""
        return x
