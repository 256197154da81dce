"""Gated activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from kvloom_kernels.call import is_native, pointer
from kvloom_kernels.native import library


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """``[T, 2 * I] -> silu(gate) * up [T, I]``, gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `silu_mul_reference`."""
    if not (gate_up.dim() == 2 and gate_up.is_contiguous() and is_native(gate_up)):
        return silu_mul_reference(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width))
    library().kvloom_silu_mul(pointer(gate_up), pointer(out), rows, width, gate_up.dtype is torch.bfloat16, torch.get_num_threads())
    return out
