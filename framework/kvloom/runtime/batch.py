"""What a worker remembers of its sequences, and how a step cuts them into ranges (no loop over tokens).

A sequence has one row: its token ids and block tables are on the device, its sampling numbers are here. A step names rows by sequence
id and brings deltas; everything else is gathered from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kvloom.errors import InternalError
from kvloom.interfaces.step import BlockCopy, NewSequence, Step
from kvloom.params import SamplingParams
from kvloom.runtime.logits import NO_PROCESSORS, SequenceProcessors
from kvloom.runtime.pooling import PoolingState
from kvloom.runtime.table import Array
from kvloom.runtime.tables import SequenceTables


@dataclass(frozen=True, slots=True)
class StepRanges:
    """One step's R ranges in the order of ``Step.ranges``, which are T tokens in all. On the host.

    Args:
        rows: ``[R]`` int64 row of each range's sequence.
        query_starts: ``[R + 1]`` int32, first token of each range.
        context_tokens: ``[R]`` int32, tokens that exist once the range is computed.
        sampled: ``[S]`` indices into the ranges of those whose last position is sampled.
    """

    rows: Array
    query_starts: Array
    context_tokens: Array
    sampled: Array

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.query_starts[-1])

    @property
    def one_each(self) -> bool:
        """Whether every range is one token that is sampled: a decode step."""
        return self.num_tokens == len(self.rows) == len(self.sampled)


class BatchState:
    """The sequences that a worker knows: as many as `tables` have rows for.

    Attributes:
        num_candidates, num_prompt_candidates: per row, candidates wanted with each output and each prompt token; -1 none.
        score_temperatures: per row, what logits are divided by before its candidates' log-probabilities are taken; 0 nothing.

    Args:
        tables: what the device remembers of them.
        start: makes the logits processors of a sequence that comes.
        start_pooling: makes the state of one that is to be pooled.
        copy: copies KV blocks.
    """

    def __init__(self, tables: SequenceTables, start: Callable[[NewSequence], SequenceProcessors] = lambda new: NO_PROCESSORS,
                 copy: Callable[[Sequence[BlockCopy]], None] = lambda copies: None,
                 start_pooling: Callable[[NewSequence], PoolingState | None] = lambda new: None) -> None:
        self.tables, self._start, self._copy, self._start_pooling = tables, start, copy, start_pooling
        max_num_seqs = tables.max_num_seqs
        self._row_of: dict[int, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._extra_tokens = {name: [0] * max_num_seqs for name in tables.extras}
        self._table_blocks = np.zeros((len(tables.blocks), max_num_seqs), np.int64)
        self.temperatures = np.zeros(max_num_seqs, np.float32)
        self.seeds = np.zeros(max_num_seqs, np.uint64)
        self.sample_indices = np.zeros(max_num_seqs, np.int64)
        self.num_candidates = np.full(max_num_seqs, -1)
        self.num_prompt_candidates = np.full(max_num_seqs, -1)
        self.score_temperatures = np.zeros(max_num_seqs, np.float32)
        self.prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self.params: list[SamplingParams | None] = [None] * max_num_seqs
        self.processors = [NO_PROCESSORS] * max_num_seqs
        self.pooling: list[PoolingState | None] = [None] * max_num_seqs
        self._step_id, self._is_taken_over = -1, True
        self._appended: set[int] = set()  # sequences whose new blocks of this step were taken over

    def apply(self, step: Step) -> None:
        """Take over a step's deltas, once however often it comes: who left, who came, block copies, which blocks its ranges append."""
        if step.step_id != self._step_id:
            self._step_id, self._is_taken_over = step.step_id, False
            self._appended.clear()
        if not self._is_taken_over:  # what raises half way is done again from its beginning: each part may be repeated
            for sequence_id in (*step.finished, *step.preempted):
                self._forget(sequence_id)
            for new in (*step.new, *step.resumed):
                self._add(new)
            if step.copies:
                self._copy(step.copies)
            for copy in step.copies:
                row = self._row_of[copy.sequence_id]
                self.tables.blocks[copy.group].write(row, int(self._table_blocks[copy.group, row]) - 1, (copy.target,))
            self._is_taken_over = True
        for r in step.ranges:
            if r.given:
                self.tables.token_ids.write(self._row_of[r.sequence_id], r.start + r.num_tokens - len(r.given), r.given)
            if r.new_blocks and r.sequence_id not in self._appended:
                self._appended.add(r.sequence_id)
                self._append_blocks(self._row_of[r.sequence_id], r.new_blocks)

    def _forget(self, sequence_id: int) -> None:
        row = self._row_of.pop(sequence_id, None)
        if row is not None:
            self.params[row], self.processors[row], self.pooling[row] = None, NO_PROCESSORS, None  # they may hold a caller's functions
            self._free_rows.append(row)

    def _add(self, new: NewSequence) -> None:
        """Give a sequence a row. What an earlier owner left there is overwritten, or beyond what is gathered."""
        row = self._row_of.get(new.sequence_id)
        if row is None:
            if not self._free_rows:
                raise InternalError(f"more than {len(self.params)} sequences are running")
            row = self._row_of[new.sequence_id] = self._free_rows.pop()
        self.tables.token_ids.write(row, 0, new.token_ids)
        for name, table in self.tables.extras.items():
            given = new.extras.get(name, ())
            earlier = max(0, self._extra_tokens[name][row] - len(given))
            table.write(row, 0, (*given, *(0,) * earlier))  # 0 for all other tokens
            self._extra_tokens[name][row] = len(given)
        self._table_blocks[:, row] = 0
        self._append_blocks(row, new.block_ids)
        self.params[row] = new.sampling
        self.processors[row], self.pooling[row] = self._start(new), self._start_pooling(new)
        self.temperatures[row] = 0.0 if new.sampling is None or new.sampling.is_greedy else new.sampling.temperature
        self.seeds[row] = new.seed
        self.sample_indices[row] = new.sample_index
        self.num_candidates[row] = -1 if new.sampling is None else new.sampling.num_candidates
        prompt_logprobs = None if new.sampling is None or new.sample_index else new.sampling.prompt_logprobs  # the leader's serve all
        self.num_prompt_candidates[row] = -1 if prompt_logprobs is None else prompt_logprobs
        self.score_temperatures[row] = new.score_temperature
        self.prompt_tokens[row] = new.prompt_tokens

    def _append_blocks(self, row: int, blocks: tuple[tuple[int, ...], ...]) -> None:
        for g, ids in enumerate(blocks):
            if ids:
                self.tables.blocks[g].write(row, int(self._table_blocks[g, row]), ids)
                self._table_blocks[g, row] += len(ids)

    def flatten(self, step: Step) -> StepRanges:
        """How a step that was applied cuts its sequences. One Python pass over the ranges."""
        ranges = step.ranges
        counts = np.fromiter((r.num_tokens for r in ranges), np.int32, len(ranges))
        query_starts = np.zeros(len(ranges) + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        return StepRanges(
            rows=np.fromiter((self._row_of[r.sequence_id] for r in ranges), np.int64, len(ranges)),
            query_starts=query_starts,
            context_tokens=np.fromiter((r.start for r in ranges), np.int32, len(ranges)) + counts,
            sampled=np.flatnonzero(np.fromiter((r.sample for r in ranges), np.bool_, len(ranges))),
        )

    def write_sampled(self, rows: Array, positions: Array, token_ids: Tensor) -> None:
        """Put sampled tokens ``[S]`` where the next step will read them, before the host, let alone the scheduler, has seen them."""
        self.tables.token_ids.write_each(rows, positions, token_ids)
