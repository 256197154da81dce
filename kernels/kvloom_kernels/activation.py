"""Gated activations."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import silu

from kvloom_kernels.call import is_native, pointer
from kvloom_kernels.plan import run
from kvloom_kernels.scratch import empty


class _Arguments(ctypes.Structure):
    _fields_ = (("gate_up", ctypes.c_void_p), ("out", ctypes.c_void_p),
                *((name, ctypes.c_int64) for name in ("rows", "width", "is_bf16")))


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """``[T, 2 * I] -> silu(gate) * up [T, I]``, gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `silu_mul_reference`."""
    if not (gate_up.dim() == 2 and gate_up.is_contiguous() and is_native(gate_up)):
        return silu_mul_reference(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = empty((rows, width), gate_up.dtype)
    run("kvloom_silu_mul", _Arguments(pointer(gate_up), pointer(out), rows, width, gate_up.dtype is torch.bfloat16))
    return out
