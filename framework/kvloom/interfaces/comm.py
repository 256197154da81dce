"""Collectives that layers call. A model never imports torch.distributed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Comm(ABC):
    """Collectives over the tensor-parallel group of one pipeline stage. Every rank calls the same ones in the same order.

    With ``size == 1`` every method returns its input and costs nothing.
    """

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks; same shape and dtype. May work in place and return its argument."""

    @abstractmethod
    def all_gather(self, x: Tensor, axis: int) -> Tensor:
        """Concatenate the ranks' tensors along `axis` (``[.., n, ..] -> [.., n * size, ..]``), rank 0 first."""

    @abstractmethod
    def all_to_all(self, x: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """Send ``send_rows[r]`` rows of `x` to rank r, return the received rows, rank 0 first (experts)."""
