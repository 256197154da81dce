"""Matrix product of a linear layer: ``x [T, in] @ weight [out, in].T + bias``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

WIDEN_FROM_ROWS = 5
"""Rows from which bfloat16 is widened on a CPU without native bfloat16 products. Measured on 2 cores with AVX2, 3072 x 576,
microseconds as (torch bfloat16, widened): 1 row 315 / 682, 4 rows 944 / 2284 (first use), 16 rows 4276 / 3143, 64 rows
15403 / 5227, 256 rows 71555 / 11277."""


@cache
def _has_native_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product in x's dtype. Shapes: ``[T, in]``, ``[out, in]``, ``[out]`` -> ``[T, out]``; all of one floating dtype.

    Where the CPU does not multiply bfloat16 natively, larger products run in float32 and are rounded once: faster and closer to
    the exact result.
    """
    if x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.shape[0] >= WIDEN_FROM_ROWS and not _has_native_bfloat16():
        return torch_linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return torch_linear(x, weight, bias)
