"""Forbidding tokens by bitmasks, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom_kernels.call import is_native, pointer
from kvloom_kernels.plan import unrecorded

WORD_BITS = 32


def apply_bitmask_reference(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """Minus infinity where a mask has a 0.

    Args:
        logits: ``[S, V]`` of any floating dtype; changed in place.
        masks: ``[g, ceil(V / 32)]`` int32: bit i % 32 of word i // 32 is token i's.
        rows: ``[g]`` int64 in [0, S), the row of each mask.

    Raises:
        ValueError: shapes, dtypes or rows that do not fit; rows on a device of their own are not looked at.
    """
    _check(logits, masks, rows)
    bits = torch.arange(WORD_BITS, device=masks.device, dtype=torch.int32)
    allowed = (masks[:, :, None] >> bits & 1).flatten(1)[:, :logits.shape[1]].bool()
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)


def apply_bitmask(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """See `apply_bitmask_reference`. Rows without a mask are not looked at."""
    if not (is_native(logits) and masks.device == rows.device == logits.device and logits.ndim == 2 and logits.stride(1) == 1):
        apply_bitmask_reference(logits, masks, rows)
        return
    _check(logits, masks, rows)
    masks, rows = masks.contiguous(), rows.contiguous()
    unrecorded("kvloom_apply_bitmask")(pointer(logits), logits.stride(0), pointer(masks), pointer(rows), rows.shape[0], logits.shape[1],
                                   logits.dtype is torch.bfloat16, torch.get_num_threads())


def _check(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """Raises ValueError for what would make the kernel read or write out of bounds."""
    words = -(-logits.shape[-1] // WORD_BITS)
    if logits.ndim != 2 or masks.shape != (len(rows), words) or masks.dtype is not torch.int32 or rows.dtype is not torch.int64:
        raise ValueError(f"logits [S, V], int32 masks [g, ceil(V / 32)] and int64 rows [g] are needed, not {list(logits.shape)}, "
                         f"{masks.dtype} {list(masks.shape)} and {rows.dtype} {list(rows.shape)}")
    if rows.device.type == "cpu" and ((rows < 0) | (rows >= logits.shape[0])).any():  # elsewhere the question would be waited for
        raise ValueError(f"rows must be in [0, {logits.shape[0]})")
