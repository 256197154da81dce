"""Root mean square normalisation, with the addition to the residual stream that comes before it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvloom_kernels.call import is_native, pointer
from kvloom_kernels.plan import run
from kvloom_kernels.scratch import empty


class _Arguments(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "stream", "out")),
                *((name, ctypes.c_int64) for name in ("rows", "width", "is_bf16")), ("eps", ctypes.c_float))


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x [..., W] / sqrt(mean(x^2) + eps) * weight [W]``: the mean in float32, the quotient rounded before it is multiplied."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rms_norm_reference`."""
    if not _is_taken(x, weight):
        return rms_norm_reference(x, weight, eps)
    out = empty(x.shape, x.dtype)
    _call(x, None, weight, None, out, eps)
    return out


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(norm(residual + x), residual + x)``; all ``[T, W]``."""
    if not (_is_taken(x, weight) and residual.shape == x.shape and residual.is_contiguous() and residual.dtype is x.dtype):
        stream = residual + x
        return rms_norm_reference(stream, weight, eps), stream
    out, stream = empty(x.shape, x.dtype), empty(x.shape, x.dtype)
    _call(x, residual, weight, stream, out, eps)
    return out, stream


def _is_taken(x: Tensor, weight: Tensor) -> bool:
    return x.is_contiguous() and weight.is_contiguous() and weight.shape == x.shape[-1:] and is_native(x, weight)


def _call(x: Tensor, residual: Tensor | None, weight: Tensor, stream: Tensor | None, out: Tensor, eps: float) -> None:
    width = x.shape[-1]
    run("kvloom_rms_norm", _Arguments(pointer(x), pointer(residual), pointer(weight), pointer(stream), pointer(out), x.numel() // width,
                                      width, x.dtype is torch.bfloat16, eps))
