"""Host memory for KV blocks that leave the device, and a step's moves between the two."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from kvloom.errors import InternalError
from kvloom.interfaces.attention import LayerCache
from kvloom.interfaces.state import KVGroup
from kvloom.interfaces.step import BlockMove, Step
from kvloom_kernels.transfer import to_device

Ids = np.ndarray[Any, np.dtype[np.int64]]

class HostBlocks:
    """A host tensor beside every KV tensor, with room for `num_blocks` blocks; block 0 stays unused. Layers that share memory on the
    device share it here.

    Args:
        groups: KV groups of the model.
        caches: KV tensors by layer index, each ``[blocks, ...]``.
        num_blocks: host blocks; ids are 1 .. num_blocks.
    """

    def __init__(self, groups: tuple[KVGroup, ...], caches: Mapping[int, LayerCache], num_blocks: int) -> None:
        self._num_blocks = num_blocks
        device = {id(t): t for cache in caches.values() for t in cache.tensors}
        host = {i: host_empty((num_blocks + 1, *t.shape[1:]), t) for i, t in device.items()}
        self._pairs = tuple(tuple((t, host[id(t)]) for layer in g.layers for t in caches[layer].tensors) for g in groups)
        self._step_id, self._is_out, self._is_in = -1, False, False

    def apply(self, step: Step) -> None:
        """Make a step's moves, once however often it comes. What raises half way is done again from where it can be: all that leaves,
        or all that comes back.

        Raises:
            InternalError: a move names a block that does not exist; nothing of its kind was moved.
        """
        if step.step_id != self._step_id:
            self._step_id, self._is_out, self._is_in = step.step_id, False, False
        if not self._is_out:
            for device, host, device_blocks, host_blocks in self._moves(step.swap_out):
                leaving = device[to_device(device_blocks, device.device)]
                for moves, blocks in _runs(host_blocks):
                    host[blocks].copy_(leaving[moves], non_blocking=True)  # nobody reads it but copies that come later
            self._is_out = True
        if not self._is_in:
            for device, host, device_blocks, host_blocks in self._moves(step.swap_in):
                coming = torch.empty((len(host_blocks), *host.shape[1:]), dtype=host.dtype, device=device.device)
                for moves, blocks in _runs(host_blocks):
                    coming[moves].copy_(host[blocks], non_blocking=True)
                device[to_device(device_blocks, device.device)] = coming
            self._is_in = True

    def _moves(self, moves: tuple[BlockMove, ...]) -> list[tuple[torch.Tensor, torch.Tensor, Ids, Ids]]:
        """Device tensor, host tensor, device blocks ``[m]``, host blocks ``[m]`` of every KV tensor that is touched."""
        out = []
        for g, pairs in enumerate(self._pairs):
            mine = [move for move in moves if move.group == g]
            if not mine:
                continue
            if not all(0 < m.host_block <= self._num_blocks and 0 < m.device_block < len(pairs[0][0]) for m in mine):
                raise InternalError(f"blocks of {mine[:3]} do not exist: the host has 1 to {self._num_blocks}")
            device_blocks, host_blocks = (np.array([m[i] for m in mine]) for i in (1, 2))
            out += [(device, host, device_blocks, host_blocks) for device, host in pairs]
        return out


def _runs(blocks: Ids) -> list[tuple[slice, slice]]:
    """Moves whose host blocks lie one after the other: their places, and the blocks."""
    cuts = [0, *(np.flatnonzero(np.diff(blocks) != 1) + 1).tolist(), len(blocks)]
    return [(slice(i, j), slice(int(blocks[i]), int(blocks[i]) + j - i)) for i, j in pairwise(cuts)]


def host_empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Uninitialised host memory; pinned where copies to the tensor's device are faster then."""
    return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=like.device.type == "cuda")
