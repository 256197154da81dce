"""The KV cache's memory. Layers at the same place of different KV groups share it: a block belongs to one group at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
import torch

from kvloom.interfaces.attention import LayerCache, TensorShape
from kvloom.interfaces.state import KVGroup
from kvloom.interfaces.step import BlockCopy
from kvloom_kernels import blocks as kernels

LayerShapes = Mapping[int, tuple[TensorShape, ...]]
"""By layer index: what the layer's backend asked for, without the block axis."""

TOUCH_S = 0.25
"""How long `allocate` uses memory for the first time."""

TOUCHED_BYTES = 128 * 2**20
"""So much of it at once."""


def page_bytes(shapes: tuple[TensorShape, ...]) -> int:
    """Bytes of one layer's state in one block."""
    return sum(math.prod(s.shape) * getattr(torch, s.dtype).itemsize for s in shapes)


def shared_memory(groups: tuple[KVGroup, ...], shapes: LayerShapes) -> list[tuple[tuple[TensorShape, ...], list[int]]]:
    """``[(shapes, layers that live in one allocation of these shapes), ...]``.

    The j-th layers of all groups share, provided their shapes are equal: only then does block b lie in the same bytes for all
    of them. A layer with other shapes gets memory of its own.
    """
    out: list[tuple[tuple[TensorShape, ...], list[int]]] = []
    for j in range(max((len(g.layers) for g in groups), default=0)):
        slot: dict[tuple[TensorShape, ...], list[int]] = {}
        for group in groups:
            if j < len(group.layers):
                slot.setdefault(shapes[group.layers[j]], []).append(group.layers[j])
        out += slot.items()
    return out


def block_bytes(groups: tuple[KVGroup, ...], shapes: LayerShapes) -> int:
    """Bytes that one block costs over the whole model."""
    return sum(page_bytes(s) for s, _ in shared_memory(groups, shapes))


def allocate(groups: tuple[KVGroup, ...], shapes: LayerShapes, num_blocks: int, device: torch.device) -> dict[int, LayerCache]:
    """Zeroed state of every layer that has any, by layer index. `num_blocks` counts block 0, the null block."""
    caches: dict[int, LayerCache] = {}
    for layer_shapes, layers in shared_memory(groups, shapes):
        tensors = tuple(_zeros((num_blocks, *s.shape), getattr(torch, s.dtype), device) for s in layer_shapes)
        caches.update((layer, LayerCache(layer, tensors)) for layer in layers)
    if device.type == "cpu":
        _touch([t for cache in caches.values() for t in cache.tensors], num_blocks)
    return caches


def copy_blocks(groups: tuple[KVGroup, ...], caches: Mapping[int, LayerCache], copies: Sequence[BlockCopy]) -> None:
    """Copy whole blocks, each in all layers of its group, as if one after the other."""
    for index, of_group in groupby(copies, key=lambda copy: copy.group):  # groups share memory: the order between them counts, too
        layers = next(group.layers for group in groups if group.index == index)
        kernels.copy_blocks([tensor for layer in layers for tensor in caches[layer].tensors], [(c.source, c.target) for c in of_group])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the host in large pages, where the system has them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _touch(tensors: Sequence[torch.Tensor], num_blocks: int) -> None:
    """Pages of the host come with their first use, which took a tenth of the time of the first requests. The blocks that are handed
    out first get theirs beforehand, for as long as a start may wait: where memory is slow to come (a virtual machine that never had it
    before) 4 GiB took 4.7 s."""
    until_s = time.monotonic() + TOUCH_S
    at_once = max(1, TOUCHED_BYTES * num_blocks // max(1, sum(t.nbytes for t in tensors)))
    for first in range(0, num_blocks, at_once):
        kernels.touch([t[first:first + at_once] for t in tensors])
        if time.monotonic() > until_s:
            return
