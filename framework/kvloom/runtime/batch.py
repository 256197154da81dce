"""What a worker remembers of its sequences, as arrays, and one step's index arithmetic over them (no loop over tokens).

A sequence has one row: its token ids, its block table per KV group, its sampling numbers. A step names rows by sequence
id and brings deltas; everything else is gathered from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvloom.errors import InternalError
from kvloom.interfaces.state import KVGroup
from kvloom.interfaces.step import BlockCopy, NewSequence, Step
from kvloom.params import SamplingParams
from kvloom.runtime.logits import NO_PROCESSORS, SequenceProcessors
from kvloom.runtime.pooling import PoolingState

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class GroupIndices:
    """Index arrays of one KV group for one step: ``block_table [R, B]`` int32, ``slots [T]`` int64."""

    block_table: Array
    slots: Array


@dataclass(frozen=True, slots=True)
class StepIndices:
    """One step flattened: R ranges, T tokens, in the order of ``Step.ranges``.

    Args:
        rows: ``[R]`` row of each range's sequence in the batch state.
        query_starts: ``[R + 1]`` int32, first token of each range.
        context_tokens: ``[R]`` int32, tokens that exist once the range is computed.
        token_ids, positions: ``[T]`` int64.
        groups: by KV group index; empty where no layer keeps state.
        sampled: ``[S]`` indices into the ranges of those whose last position is sampled.
        extras: ``[T]`` int64 each, by the names that the model asked for.
    """

    rows: Array
    query_starts: Array
    context_tokens: Array
    token_ids: Array
    positions: Array
    groups: tuple[GroupIndices, ...]
    sampled: Array
    extras: Mapping[str, Array]


class BatchState:
    """Persistent arrays of up to `max_num_seqs` sequences of up to `max_model_len` tokens. Host memory only.

    Attributes:
        num_candidates, num_prompt_candidates: per row, candidates wanted with each output and each prompt token; -1 none.
        score_temperatures: per row, what logits are divided by before its candidates' log-probabilities are taken; 0 nothing.

    Args:
        start: makes the logits processors of a sequence that comes.
        start_pooling: makes the state of one that is to be pooled.
        extra_inputs: see `Model.extra_inputs`; 0 for tokens of sequences that bring none.
        copy: copies KV blocks.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, groups: tuple[KVGroup, ...],
                 start: Callable[[NewSequence], SequenceProcessors] = lambda new: NO_PROCESSORS,
                 extra_inputs: Sequence[str] = (), copy: Callable[[Sequence[BlockCopy]], None] = lambda copies: None,
                 start_pooling: Callable[[NewSequence], PoolingState | None] = lambda new: None) -> None:
        self._groups, self._start, self._copy, self._start_pooling = groups, start, copy, start_pooling
        self._row_of: dict[int, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), np.int64)
        self._extras = {name: np.zeros_like(self.token_ids) for name in extra_inputs}
        width = [-(-max_model_len // g.block_tokens) for g in groups]
        self._tables = [np.zeros((max_num_seqs, w), np.int32) for w in width]
        self._table_blocks = np.zeros((len(groups), max_num_seqs), np.int64)
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
                self._tables[copy.group][row, self._table_blocks[copy.group, row] - 1] = copy.target
            self._is_taken_over = True
        for r in step.ranges:
            if r.given:
                end = r.start + r.num_tokens
                self.token_ids[self._row_of[r.sequence_id], end - len(r.given):end] = r.given
            if r.new_blocks and r.sequence_id not in self._appended:
                self._appended.add(r.sequence_id)
                self._append_blocks(self._row_of[r.sequence_id], r.new_blocks)

    def _forget(self, sequence_id: int) -> None:
        row = self._row_of.pop(sequence_id, None)
        if row is not None:
            self.params[row], self.processors[row], self.pooling[row] = None, NO_PROCESSORS, None  # they may hold a caller's functions
            self._free_rows.append(row)

    def _add(self, new: NewSequence) -> None:
        """Give a sequence a row. Everything that an earlier owner left there is overwritten or zeroed."""
        row = self._row_of.get(new.sequence_id)
        if row is None:
            if not self._free_rows:
                raise InternalError(f"more than {len(self.params)} sequences are running")
            row = self._row_of[new.sequence_id] = self._free_rows.pop()
        self.token_ids[row] = 0
        self.token_ids[row, : len(new.token_ids)] = new.token_ids
        for name, values in self._extras.items():
            given = new.extras.get(name, ())
            values[row] = 0
            values[row, : len(given)] = given
        for table in self._tables:
            table[row] = 0
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
                start = self._table_blocks[g, row]
                self._tables[g][row, start: start + len(ids)] = ids
                self._table_blocks[g, row] = start + len(ids)

    def indices(self, step: Step) -> StepIndices:
        """Flatten a step. Cost: a few numpy calls, one Python pass over the ranges."""
        ranges = step.ranges
        rows = np.fromiter((self._row_of[r.sequence_id] for r in ranges), np.int64, len(ranges))
        starts = np.fromiter((r.start for r in ranges), np.int64, len(ranges))
        counts = np.fromiter((r.num_tokens for r in ranges), np.int64, len(ranges))
        sampled = np.flatnonzero(np.fromiter((r.sample for r in ranges), np.bool_, len(ranges)))
        ends = np.cumsum(counts)
        query_starts = np.concatenate(([0], ends))
        contexts = starts + counts
        if int(ends[-1]) == len(ranges):  # decode only: one token a range
            of_row, positions = np.arange(len(ranges)), starts
        else:
            of_row = np.repeat(np.arange(len(ranges)), counts)
            positions = np.arange(int(ends[-1])) + np.repeat(starts - query_starts[:-1], counts)
        token_rows = rows[of_row]
        return StepIndices(
            rows=rows,
            query_starts=query_starts.astype(np.int32),
            context_tokens=contexts.astype(np.int32),
            token_ids=self.token_ids[token_rows, positions],
            positions=positions,
            groups=tuple(self._group_indices(g, rows, of_row, positions, int(contexts.max())) for g in range(len(self._groups))),
            sampled=sampled,
            extras={name: values[token_rows, positions] for name, values in self._extras.items()},
        )

    def _group_indices(self, g: int, rows: Array, of_row: Array, positions: Array, max_context: int) -> GroupIndices:
        block_tokens = self._groups[g].block_tokens
        table = self._tables[g][rows, : -(-max_context // block_tokens)]
        block, offset = np.divmod(positions, block_tokens)
        return GroupIndices(table, table[of_row, block].astype(np.int64) * block_tokens + offset)

    def write_sampled(self, rows: Array, positions: Array, token_ids: Array) -> None:
        """Put sampled tokens where the next step will read them, before the scheduler has seen them."""
        self.token_ids[rows, positions] = token_ids
