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


def _places(ranges: Ranges, tokens: int) -> tuple[Tensor, Tensor]:
    """Range and position of each token, ``[T]`` int64 and int32."""
    each = torch.arange(tokens, dtype=torch.int32, device=ranges.rows.device)
    of = torch.searchsorted(ranges.query_starts[1:], each, right=True)
    return of, each + (ranges.context_tokens - ranges.query_starts[1:])[of]


def gather_tokens_reference(kept: Tensor, ranges: Ranges, values: Tensor, positions: Tensor) -> None:
    """What each token's sequence has at its position.

    Args:
        kept: ``[rows, columns]`` int32, by row and position.
        values, positions: ``[T]`` int64, filled.
    """
    of, place = _places(ranges, len(values))
    values.copy_(kept[ranges.rows[of].long(), place.long()])
    positions.copy_(place)


def gather_tokens(kept: Tensor, ranges: Ranges, values: Tensor, positions: Tensor) -> None:
    """See `gather_tokens_reference`."""
    if not _is_native(kept):
        gather_tokens_reference(kept, ranges, values, positions)
        return
    unrecorded("kvloom_gather_tokens")(pointer(kept), kept.stride(0), *map(pointer, ranges), len(ranges.rows), pointer(values),
                                       pointer(positions))


def gather_blocks_reference(tables: Tensor, ranges: Ranges, block_tokens: int, block_table: Tensor, slots: Tensor) -> None:
    """The blocks of each range's context, and where each token's key and value go.

    Args:
        tables: ``[rows, columns]`` int32 block ids, by row and place in the sequence.
        block_table: ``[R, B]`` int32, filled, 0 beyond a range's context; B is what the longest one needs, or more.
        slots: ``[T]`` int64, filled: ``block * block_tokens + offset``.
    """
    columns = block_table.shape[1]
    needed = (ranges.context_tokens + (block_tokens - 1)) // block_tokens
    places = torch.arange(columns, dtype=torch.int32, device=tables.device)
    block_table.copy_(tables[:, :columns].index_select(0, ranges.rows) * (places < needed[:, None]))
    of, position = _places(ranges, len(slots))
    block, offset = (position // block_tokens).long(), position % block_tokens
    slots.copy_(tables[ranges.rows[of].long(), block].long() * block_tokens + offset)


def gather_blocks(tables: Tensor, ranges: Ranges, block_tokens: int, block_table: Tensor, slots: Tensor) -> None:
    """See `gather_blocks_reference`."""
    if not _is_native(tables):
        gather_blocks_reference(tables, ranges, block_tokens, block_table, slots)
        return
    unrecorded("kvloom_gather_blocks")(pointer(tables), tables.stride(0), *map(pointer, ranges), len(ranges.rows), block_tokens,
                                       pointer(block_table), block_table.stride(0), block_table.shape[1], pointer(slots))


def _is_native(tables: Tensor) -> bool:
    return tables.device.type == "cpu" and problem() is None
