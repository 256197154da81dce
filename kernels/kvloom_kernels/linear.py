"""Matrix product of a linear layer: ``x [T, in] @ weight [out, in].T + bias``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear as linear_reference

from kvloom_kernels.call import pointer
from kvloom_kernels.native import library, problem

WIDEN_FROM_ROWS = 5
"""Rows from which bfloat16 is widened on a CPU without native bfloat16 products. Measured on 2 cores with AVX2, 3072 x 576,
microseconds as (torch bfloat16, widened): 1 row 315 / 682, 4 rows 944 / 2284 (first use), 16 rows 4276 / 3143, 64 rows
15403 / 5227, 256 rows 71555 / 11277."""


@cache
def product_kind() -> str:
    """How bfloat16 is multiplied on this CPU: "native" (our kernel), "torch" (torch has the instructions), "widened" (to float32)."""
    if problem() is None and library().kvloom_has_linear():
        return "native"
    return "torch" if torch.cpu._is_avx512_bf16_supported() else "widened"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product in x's dtype. Shapes: ``[T, in]``, ``[out, in]``, ``[out]`` -> ``[T, out]``; all of one floating dtype.

    Sums are taken in float32 and rounded once. Where the CPU does not multiply bfloat16 natively, larger products run in float32.
    """
    if x.dtype is not torch.bfloat16 or x.device.type != "cpu":
        return linear_reference(x, weight, bias)
    kind = product_kind()
    if kind == "native" and x.shape[1] % 2 == 0 and weight.is_contiguous():
        return _native(x.contiguous(), weight, bias)
    if kind == "widened" and x.shape[0] >= WIDEN_FROM_ROWS:
        return linear_reference(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return linear_reference(x, weight, bias)


def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty((x.shape[0], weight.shape[0]))
    library().kvloom_linear(pointer(x), pointer(weight), pointer(bias), pointer(out), x.shape[0], weight.shape[0], x.shape[1],
                            torch.get_num_threads())
    return out
