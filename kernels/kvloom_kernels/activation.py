"""Gated activations."""

from __future__ import annotations

import ctypes
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from kvloom_kernels.call import is_native, pointer
from kvloom_kernels.plan import run
from kvloom_kernels.scratch import empty


class Finish(IntEnum):
    """What becomes of a gated product: nothing, or ``f(gate) * up``. Numbers as in common.h."""

    PLAIN = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3


class _Arguments(ctypes.Structure):
    _fields_ = (("gate_up", ctypes.c_void_p), ("out", ctypes.c_void_p),
                *((name, ctypes.c_int64) for name in ("rows", "width", "is_bf16", "finish")))


def gated_mul_reference(gate_up: Tensor, finish: Finish) -> Tensor:
    """``[T, 2 * I] -> f(gate) * up [T, I]``, gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = silu(gate) if finish is Finish.SILU else gelu(gate, approximate="tanh" if finish is Finish.GELU_TANH else "none")
    return gate * up


def gated_mul(gate_up: Tensor, finish: Finish) -> Tensor:
    """See `gated_mul_reference`. A row's result does not depend on the other rows."""
    if not (gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0 and gate_up.is_contiguous() and is_native(gate_up)):
        return gated_mul_reference(gate_up, finish)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = empty((rows, width), gate_up.dtype)
    run("kvloom_gated_mul", _Arguments(pointer(gate_up), pointer(out), rows, width, gate_up.dtype is torch.bfloat16, finish))
    return out


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """``[T, 2 * I] -> silu(gate) * up [T, I]``, gate first."""
    return gated_mul_reference(gate_up, Finish.SILU)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `silu_mul_reference`."""
    return gated_mul(gate_up, Finish.SILU)
