"""Arguments of the C++ kernels, from tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom_kernels.native import problem

DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels compute in."""


def is_native(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: on the CPU, one of `DTYPES`, all the same, and the kernels are there."""
    first = tensors[0]
    return computes(first.dtype, first.device) and all(t.dtype is first.dtype for t in tensors)


def computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels take tensors of this dtype there."""
    return device.type == "cpu" and dtype in DTYPES and problem() is None


def pointer(tensor: Tensor | None) -> int | None:
    """Address of the first element; None is a null pointer."""
    return None if tensor is None else tensor.data_ptr()
