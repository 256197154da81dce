"""Tables of numbers that a device keeps from step to step: the host writes what is new, and never reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import InternalError
from kvloom_kernels.transfer import to_device

Array = np.ndarray[Any, Any]


class Table(ABC):
    """``[rows, columns]`` int32, 0 at first.

    Attributes:
        tensor: on the device.
    """

    tensor: Tensor

    def write(self, row: int, start: int, values: Sequence[int] | Array) -> None:
        """Put numbers into a row, from column `start` on. Raises `InternalError` where it has not so many."""
        if start < 0 or start + len(values) > self.tensor.shape[1]:
            raise InternalError(f"{len(values)} numbers from column {start} on are more than a row of {self.tensor.shape[1]} takes")
        self._write(row, start, values)

    @abstractmethod
    def _write(self, row: int, start: int, values: Sequence[int] | Array) -> None:
        """See `write`: they fit."""

    @abstractmethod
    def write_each(self, rows: Array, columns: Array, values: Tensor) -> None:
        """Put one number, which the device knows, into each of some rows, in the order of the device's work."""

    @abstractmethod
    def send(self) -> None:
        """What was written before is there for all work that the device is given from now on."""


class HostTable(Table):
    """Where the device is the host. Rows that were never written take no memory."""

    def __init__(self, rows: int, columns: int) -> None:
        self._host = np.zeros((rows, columns), np.int32)
        self.tensor = torch.from_numpy(self._host)

    def _write(self, row: int, start: int, values: Sequence[int] | Array) -> None:
        self._host[row, start:start + len(values)] = values

    def write_each(self, rows: Array, columns: Array, values: Tensor) -> None:
        """See `Table.write_each`."""
        self._host[rows, columns] = values.numpy()

    def send(self) -> None:
        """See `Table.send`: it is there."""


class SentTable(Table):
    """On a device with memory of its own: what is new waits, and goes there in one copy."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.tensor = torch.zeros((rows, columns), dtype=torch.int32, device=device)
        self._waiting: list[tuple[int, Array]] = []

    def _write(self, row: int, start: int, values: Sequence[int] | Array) -> None:
        self._waiting.append((row * self.tensor.shape[1] + start, np.array(values, np.int64)))

    def write_each(self, rows: Array, columns: Array, values: Tensor) -> None:
        """See `Table.write_each`."""
        self.send()
        places = to_device(rows * self.tensor.shape[1] + columns, self.tensor.device)
        self.tensor.view(-1)[places] = values.int()

    def send(self) -> None:
        """See `Table.send`. What was written twice goes once: the device may write in any order."""
        if not self._waiting:
            return
        places = np.concatenate([np.arange(start, start + len(values)) for start, values in self._waiting])
        values = np.concatenate([values for _, values in self._waiting])
        if self._is_written_twice():
            places, last = np.unique(places[::-1], return_index=True)
            values = values[::-1][last]
        sent = to_device(np.stack((places, values)), self.tensor.device)
        self.tensor.view(-1)[sent[0]] = sent[1].int()
        self._waiting.clear()

    def _is_written_twice(self) -> bool:
        parts = sorted((start, start + len(values)) for start, values in self._waiting if len(values))
        return any(stop > start for (_, stop), (start, _) in pairwise(parts))
