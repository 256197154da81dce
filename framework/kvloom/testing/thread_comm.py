"""A tensor-parallel group whose ranks are threads of this process: for tests of layers and models, not for speed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvloom.errors import UnsupportedFeatureError
from kvloom.interfaces.comm import Comm

PATIENCE_S = 120
"""How long a rank waits for the others before it gives up: one of them failed."""


class ThreadComm(Comm):
    """One rank of a group; all of its members share `board` and `barrier`."""

    def __init__(self, rank: int, size: int, board: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._board, self._barrier = rank, size, board, barrier

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._board[self.rank] = x.clone()
        self._barrier.wait(PATIENCE_S)
        everyone = [part for part in self._board if part is not None]
        self._barrier.wait(PATIENCE_S)
        return everyone

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Comm.all_reduce`."""
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor, axis: int) -> Tensor:
        """See `Comm.all_gather`."""
        return torch.cat(self._exchange(x), dim=axis)

    def all_to_all(self, x: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        """Raises `UnsupportedFeatureError`."""
        raise UnsupportedFeatureError("all_to_all", type(self).__name__, "it serves layers without experts")


def run_ranks(size: int, work: Callable[[Comm], Any]) -> list[Any]:
    """What `work` gives for each rank's `Comm`, in order; what it raised first is raised."""
    board: list[Tensor | None] = [None] * size
    barrier = threading.Barrier(size)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadComm(rank, size, board, barrier))
        except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
