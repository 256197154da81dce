"""Decode steps, recorded once and repeated.

A recorded step has fixed inputs (buffers that each step fills) and fixed memory for its results. It is recorded while it runs for the
first time, for a power of two of rows, and serves all steps of as many rows or fewer: a batch that shrinks records nothing more. What
cannot be recorded, because a model or a backend computes with something else than our kernels, runs call by call, with equal results;
the log says once what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.interfaces.attention import AttentionBatch
from kvloom.interfaces.model import ForwardContext, LayerStep, Model, ModelInputs
from kvloom.logs import get_logger
from kvloom.runtime.batch import StepIndices
from kvloom.runtime.capture import Capture, Replay, patch_problem
from kvloom_kernels.plan import NotRecordableError

MakeContext = Callable[[Sequence[AttentionBatch]], ForwardContext]
"""From one batch a KV group to what a model's forward is given."""

Refill = Callable[[Sequence[LayerStep | None], Sequence[AttentionBatch]], None]
"""Brings what a context's layers are given up to date with other numbers in the same memory."""


class DecodeOutputs(NamedTuple):
    """``hidden [R, H]`` and ``logits [R, V]`` of a decode step, good until the next step."""

    hidden: Tensor
    logits: Tensor


class Buffers:
    """The inputs of decode steps of up to `rows` rows, at fixed addresses.

    Args:
        widths: blocks of the longest table, by KV group.
    """

    def __init__(self, rows: int, widths: Sequence[int]) -> None:
        self.rows = rows
        self.token_ids, self.positions = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.starts, self.contexts = np.arange(rows + 1, dtype=np.int32), np.zeros(rows, np.int32)
        self.tables = [np.zeros((rows, width), np.int32) for width in widths]
        self.slots = [np.zeros(rows, np.int64) for _ in widths]

    def fill(self, indices: StepIndices) -> None:
        """Take over a step's numbers. Rows beyond it are computed when a step is recorded: they work on block 0, which is nobody's."""
        rows = len(indices.rows)
        for buffer, values, beyond in ((self.token_ids, indices.token_ids, 0), (self.positions, indices.positions, 0),
                                       (self.contexts, indices.context_tokens, 1)):
            buffer[:rows], buffer[rows:] = values, beyond
        for table, slots, group in zip(self.tables, self.slots, indices.groups, strict=True):
            table[:rows, :group.block_table.shape[1]], table[rows:, 0] = group.block_table, 0
            slots[:rows], slots[rows:] = group.slots, 0

    def inputs(self, rows: int) -> ModelInputs:
        """Of a step of so many rows."""
        return ModelInputs(torch.from_numpy(self.token_ids[:rows]), torch.from_numpy(self.positions[:rows])[None])

    def batches(self, rows: int) -> list[AttentionBatch]:
        """By KV group, of a step of so many rows. The host's numbers are those of the recording."""
        return [AttentionBatch(
            query_starts=torch.from_numpy(self.starts[:rows + 1]), context_tokens=torch.from_numpy(self.contexts[:rows]),
            block_table=torch.from_numpy(table[:rows]), slots=torch.from_numpy(slots[:rows]), query_starts_host=self.starts[:rows + 1],
            context_tokens_host=self.contexts[:rows], max_query_tokens=1, max_context_tokens=int(self.contexts[:rows].max()),
        ) for table, slots in zip(self.tables, self.slots, strict=True)]


class _Recorded(NamedTuple):
    replay: Replay
    outputs: DecodeOutputs
    kept: tuple[ModelInputs, ForwardContext]


class DecodeGraphs:
    """Decode steps of one runner.

    Attributes:
        problem: why no step can be recorded; None while none was tried, or when it worked.

    Args:
        model: it records.
        make_context: for its forward.
        refill: before each repetition.
        buffers: that steps are read from.
        capture: of the device.
    """

    def __init__(self, model: Model, make_context: MakeContext, refill: Refill, buffers: Buffers, capture: Capture) -> None:
        self._model, self._make_context, self._refill, self._buffers, self._capture = model, make_context, refill, buffers, capture
        self._recorded: dict[int, _Recorded] = {}
        self.problem: str | None = None

    def forget(self) -> None:
        """Record again: the model may have changed."""
        self._recorded.clear()
        self.problem = None

    def run(self, indices: StepIndices) -> DecodeOutputs | None:
        """Compute a step of one token a row, all of which are sampled; None where that has to be done call by call."""
        if self.problem is not None:
            return None
        rows = len(indices.rows)
        self._buffers.fill(indices)
        found = self._recorded.get(min((c for c in self._recorded if c >= rows), default=0))
        if found is not None:
            self._refill(found.kept[1].layers, self._buffers.batches(rows))
            found.replay(rows)
        elif (found := self._record(min(1 << (rows - 1).bit_length(), self._buffers.rows))) is None:
            return None
        return DecodeOutputs(found.outputs.hidden[:rows], found.outputs.logits[:rows])

    def _record(self, rows: int) -> _Recorded | None:
        inputs, ctx = self._buffers.inputs(rows), self._make_context(self._buffers.batches(rows))

        def compute() -> tuple[Tensor, Tensor]:
            hidden = self._model.forward(inputs, ctx).hidden
            return hidden, self._model.logits(hidden, ctx)

        try:
            if (problem := patch_problem(self._model)) is not None:
                raise NotRecordableError(problem)
            replay, (hidden, logits) = self._capture.record(compute, rows)
        except NotRecordableError as error:
            self.problem = str(error)
            get_logger().info("decode steps run call by call", reason=self.problem)
            return None
        self._recorded[rows] = _Recorded(replay, DecodeOutputs(hidden, logits), (inputs, ctx))
        return self._recorded[rows]
