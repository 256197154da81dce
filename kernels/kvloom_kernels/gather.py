"""A step's numbers (token ids, positions, block tables, slots), gathered on the device from tables with a row a sequence.

The plain-torch references are what runs wherever the C++ kernels are not: they wait for no device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvloom_kernels.call import pointer
from kvloom_kernels.native import problem
from kvloom_kernels.plan import unrecorded


class Ranges(NamedTuple):
    """How the T tokens of a step are cut into R ranges, int32 on the device.

    Fields:
        rows: ``[R]`` row of each range's sequence.
        query_starts: ``[R + 1]``; range r is tokens ``[query_starts[r], query_starts[r + 1])`` of the step. It may be empty.
        context_tokens: ``[R]`` tokens that the sequence has then: the range is the last of them.
    """

    rows: Tensor
    query_starts: Tensor
    context_tokens: Tensor


class Places(NamedTuple):
    """Where each token is: ``rows [T]`` and ``positions [T]`` int64, of its sequence and in it."""

    rows: Tensor
    positions: Tensor


def gather_tokens_reference(kept: Tensor, ranges: Ranges, values: Tensor, places: Places) -> None:
    """Where each token is, and what its sequence has there.

    Args:
        kept: ``[rows, columns]`` int32, by row and position.
        values: ``[T]`` int64, filled, as `places` are.
    """
    each = torch.arange(len(values), dtype=torch.int32, device=kept.device)
    of = torch.searchsorted(ranges.query_starts[1:], each, right=True)
    places.rows.copy_(ranges.rows[of])
    places.positions.copy_(each + (ranges.context_tokens - ranges.query_starts[1:])[of])
    values.copy_(kept[places])


def gather_tokens(kept: Tensor, ranges: Ranges, values: Tensor, places: Places) -> None:
    """See `gather_tokens_reference`."""
    if not _is_native(kept):
        gather_tokens_reference(kept, ranges, values, places)
        return
    unrecorded("kvloom_gather_tokens")(pointer(kept), kept.stride(0), *map(pointer, ranges), len(ranges.rows), pointer(values),
                                       *map(pointer, places))


def gather_blocks_reference(tables: Tensor, ranges: Ranges, places: Places, block_tokens: int, block_table: Tensor,
                            slots: Tensor) -> None:
    """The blocks of each range's context, and where each token's key and value go.

    Args:
        tables: ``[rows, columns]`` int32 block ids, by row and place in the sequence.
        places: of the tokens.
        block_table: ``[R, B]`` int32, filled, 0 beyond a range's context; B is what the longest one needs, or more.
        slots: ``[T]`` int64, filled: ``block * block_tokens + offset``.
    """
    columns = torch.arange(block_table.shape[1], dtype=torch.int32, device=tables.device)
    needed = (ranges.context_tokens + (block_tokens - 1)) // block_tokens
    block_table.copy_(tables[:, :len(columns)].index_select(0, ranges.rows) * (columns < needed[:, None]))
    blocks = tables[places.rows, places.positions // block_tokens].long()
    torch.add(places.positions % block_tokens, blocks, alpha=block_tokens, out=slots)


def gather_blocks(tables: Tensor, ranges: Ranges, places: Places, block_tokens: int, block_table: Tensor, slots: Tensor) -> None:
    """See `gather_blocks_reference`."""
    if not _is_native(tables):
        gather_blocks_reference(tables, ranges, places, block_tokens, block_table, slots)
        return
    unrecorded("kvloom_gather_blocks")(
        pointer(tables), tables.stride(0), pointer(ranges.rows), pointer(ranges.context_tokens), len(ranges.rows),
        *map(pointer, places), len(slots), block_tokens, pointer(block_table), block_table.stride(0), block_table.shape[1],
        pointer(slots))


def _is_native(tables: Tensor) -> bool:
    return tables.device.type == "cpu" and problem() is None
