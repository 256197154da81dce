"""Memory for what lives within one step: handed out again and again, so that no step waits for fresh pages."""

from __future__ import annotations

import math
import threading
import weakref
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from kvloom_kernels.blocks import touch

ALIGNMENT_BYTES = 64


class Arena:
    """A block of memory from which tensors are cut. A tensor's room is free again when nothing refers to its storage.

    Args:
        size_bytes: of the block. Its pages come with their first use.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._memory = np.empty(size_bytes, np.uint8)
        self._offset = -self._memory.ctypes.data % ALIGNMENT_BYTES
        self._free = [(self._offset, size_bytes - self._offset)]  # (start, bytes), in order, never adjacent

    def touch(self) -> None:
        """Use the first half for the first time now, so that no step waits for its pages; more is used where pieces lie apart."""
        touch([torch.from_numpy(self._memory[:self.size_bytes // 2])])

    @property
    def free_bytes(self) -> int:
        """Room that is left, maybe in pieces."""
        return sum(size for _, size in self._free)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """A tensor of this shape, uninitialised; None when there is no room."""
        used_bytes = math.prod(shape) * dtype.itemsize
        start = self._take(-(-used_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        if start is None:
            return None
        piece = self._memory[start:start + used_bytes]
        weakref.finalize(piece, self._give_back, start, -(-used_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES).atexit = False
        return torch.from_numpy(piece).view(dtype).view(*shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor begins in this memory."""
        return 0 <= tensor.data_ptr() - self._memory.ctypes.data < self.size_bytes

    def alias(self, tensor: Tensor) -> Tensor:
        """The same bytes of the arena as another tensor, which does not keep them: good until they are handed out again.

        Raises:
            ValueError: they are not the arena's.
        """
        if not (self.holds(tensor) and tensor.is_contiguous()):
            raise ValueError("the tensor does not lie in this arena in one piece")
        start = tensor.data_ptr() - self._memory.ctypes.data
        return torch.from_numpy(self._memory[start:start + tensor.nbytes]).view(tensor.dtype).view(tensor.shape)

    def _take(self, size: int) -> int | None:
        for i, (start, room) in enumerate(self._free):
            if room >= size:
                if room == size:
                    del self._free[i]
                else:
                    self._free[i] = (start + size, room - size)
                return start
        return None

    def _give_back(self, start: int, size: int) -> None:
        i = bisect_left(self._free, (start, 0))
        if i < len(self._free) and start + size == self._free[i][0]:
            size += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == start:
            start, before = self._free.pop(i - 1)
            size += before
        insort(self._free, (start, size))


class _Thread(threading.local):
    arena: Arena | None = None


_thread = _Thread()


@contextmanager
def scratch_from(arena: Arena | None) -> Iterator[None]:
    """Within the block kernels that this thread calls put their results into `arena`. They are meant for one step only. Kernels are
    called through models of others, which pass no arena on."""
    before, _thread.arena = _thread.arena, arena
    try:
        yield
    finally:
        _thread.arena = before


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU for a kernel's result, from the active arena if there is one with room."""
    found = None if _thread.arena is None else _thread.arena.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype) if found is None else found


def empty_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised tensor of another's dtype and device; on the CPU see `empty`."""
    return empty(shape, tensor.dtype) if tensor.device.type == "cpu" else tensor.new_empty(shape)
