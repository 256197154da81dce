"""Between the host and a device with memory of its own: numbers go there from pinned memory, without waiting, and all that a step needs
of its results comes back in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on `device`. On the host itself the tensor shares the array's memory; elsewhere the array may be
    changed at once, and nobody waits."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":  # torch keeps the pinned copy until the device has read it
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors on the host, in one copy; waits until they are computed. All on one device."""
    if not tensors or tensors[0].device.type == "cpu":
        return list(tensors)
    return unpacked(packed(tensors).cpu(), tensors)


def _order(tensors: Sequence[Tensor]) -> list[int]:
    """The widest first, so that each begins at a multiple of its itemsize."""
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].dtype.itemsize)


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all of them, one after the other: ``[bytes]`` uint8."""
    return torch.cat([tensors[i].contiguous().reshape(-1).view(torch.uint8) for i in _order(tensors)])


def unpacked(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut what `packed` gave into tensors of the shapes and dtypes of those that it was given."""
    out, start, tensors = list(like), 0, like
    for i in _order(like):
        size_bytes = tensors[i].numel() * tensors[i].dtype.itemsize
        out[i] = packed[start:start + size_bytes].view(tensors[i].dtype).view(tensors[i].shape)
        start += size_bytes
    return out
