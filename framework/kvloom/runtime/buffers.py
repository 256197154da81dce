"""What a step's forward reads; of recorded steps at fixed addresses on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvloom.interfaces.attention import AttentionBatch
from kvloom.interfaces.model import ModelInputs
from kvloom.runtime.batch import StepRanges
from kvloom.runtime.device import ComputeDevice, fixed_arrays
from kvloom.runtime.table import Array
from kvloom.runtime.tables import GroupTensors, SequenceTables
from kvloom_kernels.gather import Ranges


class StepBuffers:
    """Inputs of steps of up to `tokens` tokens in up to `ranges` ranges. A step sends how its tokens are cut, in one copy; the rest is
    gathered on the device.

    Args:
        tables: they are gathered from.
        longest_tokens: of any context.
    """

    def __init__(self, tables: SequenceTables, ranges: int, tokens: int, longest_tokens: int, device: ComputeDevice) -> None:
        self.ranges, self.tokens = ranges, tokens
        self._tables, self._longest_tokens = tables, longest_tokens
        self._memory, (self._rows, self._starts, self._contexts) = fixed_arrays(device, (ranges, ranges + 1, ranges))
        self._tensors = tables.tensors(ranges, tokens, tables.columns(longest_tokens))
        for group in self._tensors.groups:
            group.block_table.zero_()  # blocks beyond a context are read before they are masked: they must be some

    def fill(self, step: StepRanges, computed_ranges: int | None = None) -> None:
        """Take over a step. Ranges beyond it that are computed, too, are a token of nobody's each; those beyond `computed_ranges` are
        empty."""
        ranges, tokens = len(step.rows), step.num_tokens
        computed = ranges if computed_ranges is None else computed_ranges
        self._memory.begin()
        rows, starts, contexts = self._rows.host, self._starts.host, self._contexts.host
        rows[:ranges], rows[ranges:] = step.rows, self._tables.nobody
        contexts[:ranges], contexts[ranges:computed], contexts[computed:] = step.context_tokens, 1, 0
        starts[:ranges + 1], starts[ranges + 1:] = step.query_starts, tokens + computed - ranges
        if computed > ranges:
            starts[ranges + 1:computed + 1] = np.arange(tokens + 1, tokens + 1 + computed - ranges)
        self._memory.send()
        columns = self._tables.columns(int(step.context_tokens.max()))
        self._tables.gather(self._ranges(computed), self._tensors.part(computed, tokens + computed - ranges, columns))

    def inputs(self, tokens: int) -> ModelInputs:
        """Of a step of so many tokens."""
        part = self._tensors.part(0, tokens, self._tables.columns(0))
        return ModelInputs(part.token_ids, part.places.positions[None], extras=part.extras)

    def batches(self, ranges: int, tokens: int, max_query_tokens: int) -> list[AttentionBatch]:
        """By KV group, of a step of so many ranges and tokens. The host's numbers are those of the last one that was filled in; the
        longest context is the longest that there may be."""
        part = self._tensors.part(ranges, tokens, self._tables.columns(self._longest_tokens))
        return attention_batches(self._ranges(ranges), part.groups, self._starts.host[:ranges + 1], self._contexts.host[:ranges],
                                 max_query_tokens, self._longest_tokens)

    def _ranges(self, count: int) -> Ranges:
        return Ranges(self._rows.device[:count], self._starts.device[:count + 1], self._contexts.device[:count])


def attention_batches(ranges: Ranges, groups: Sequence[GroupTensors], query_starts_host: Array, context_tokens_host: Array,
                      max_query_tokens: int, max_context_tokens: int) -> list[AttentionBatch]:
    """One a group, of a step that is cut into `ranges`, whose numbers the host knows, too."""
    return [AttentionBatch(
        query_starts=ranges.query_starts, context_tokens=ranges.context_tokens, block_table=group.block_table, slots=group.slots,
        query_starts_host=query_starts_host, context_tokens_host=context_tokens_host, max_query_tokens=max_query_tokens,
        max_context_tokens=max_context_tokens,
    ) for group in groups]
