"""Copies of whole KV blocks within their tensors, and the first use of their memory."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvloom_kernels.native import problem
from kvloom_kernels.plan import run
from kvloom_kernels.transfer import to_device

Pair = tuple[int, int]
"""Source and target of a copy."""


class _Copies(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("tensors", "block_bytes", "pairs")),
                *((name, ctypes.c_int64) for name in ("count", "rows")))


class _Pieces(ctypes.Structure):
    _fields_ = (("starts", ctypes.c_void_p), ("bytes", ctypes.c_void_p), ("rows", ctypes.c_int64), ("page_bytes", ctypes.c_int64))


def copy_blocks_reference(tensors: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
    """``tensor[target] = tensor[source]`` for each pair in turn and each tensor ``[N, ...]``."""
    for tensor in tensors:
        for source, target in pairs:
            tensor[target] = tensor[source]


def copy_blocks(tensors: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
    """See `copy_blocks_reference`. Contiguous tensors on the CPU: all in one call of the C++ kernel; else few calls of torch.

    Raises:
        IndexError: a block that a tensor does not have.
    """
    if not tensors or not pairs:
        return
    least = min(t.shape[0] for t in tensors)
    if not all(0 <= block < least for pair in pairs for block in pair):
        raise IndexError(f"blocks must be in [0, {least}): {pairs}")
    if all(t.device.type == "cpu" and t.is_contiguous() for t in tensors) and problem() is None:
        _copy_on_host(tensors, pairs)
        return
    for part in _independent(pairs):
        sources, targets = to_device(np.array(part).T, tensors[0].device)
        for tensor in tensors:
            as_bytes = tensor.view(torch.uint8)  # dtypes of 8 bits cannot be indexed everywhere
            as_bytes.index_copy_(0, targets, as_bytes.index_select(0, sources))


def _copy_on_host(tensors: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
    count = len(tensors)
    starts = (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors))
    sizes = (ctypes.c_int64 * count)(*(t.nbytes // t.shape[0] for t in tensors))
    flat = (ctypes.c_int64 * (2 * len(pairs)))(*(block for pair in pairs for block in pair))
    run("kvloom_copy_blocks", _Copies(*(ctypes.addressof(array) for array in (starts, sizes, flat)), count, len(pairs)))


def touch_reference(tensors: Sequence[Tensor]) -> None:
    """A zero at the beginning of each page of each tensor's memory."""
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8)[::mmap.PAGESIZE] = 0


def touch(tensors: Sequence[Tensor]) -> None:
    """Use the memory of contiguous tensors on the CPU, which hold nothing but zeros, for the first time, all threads together. Without
    the C++ kernels nothing is done: pages come with what is written."""
    if problem() is not None:
        return
    count = len(tensors)
    starts = (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors))
    sizes = (ctypes.c_int64 * count)(*(t.nbytes for t in tensors))
    run("kvloom_touch", _Pieces(ctypes.addressof(starts), ctypes.addressof(sizes), count, mmap.PAGESIZE))


def _independent(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Cut where a copy reads or writes what an earlier one wrote: a part's copies may be made at once."""
    parts: list[list[Pair]] = []
    written: set[int] = set()
    for pair in pairs:
        if not parts or not written.isdisjoint(pair):
            parts.append([])
            written = set()
        parts[-1].append(pair)
        written.add(pair[1])
    return parts
