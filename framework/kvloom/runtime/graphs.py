"""Decode steps, recorded once and repeated. `range_graph` does the same for steps with prompts.

A recorded step has fixed inputs (buffers that each step fills) and fixed memory for its results. It is recorded while it runs for the
first time, for a number of rows that the device's way to record chooses (`Capture.size`), and serves steps of as many rows or fewer.
What cannot be recorded, on a CPU because a model or a backend computes with something else than our kernels, runs call by call, with
equal results; the log says once what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from kvloom.interfaces.attention import AttentionBatch
from kvloom.interfaces.model import ForwardContext, LayerStep, Model
from kvloom.logs import get_logger
from kvloom.runtime.batch import StepRanges
from kvloom.runtime.buffers import StepBuffers
from kvloom.runtime.capture import Capture, Replay, patch_problem
from kvloom_kernels.plan import NotRecordableError

Recording = TypeVar("Recording")
MakeContext = Callable[[Sequence[AttentionBatch]], ForwardContext]
"""From one batch a KV group to what a model's forward is given."""

Refill = Callable[[Sequence[LayerStep | None], Sequence[AttentionBatch]], None]
"""Brings what a context's layers are given up to date with other numbers in the same memory."""


class DecodeOutputs(NamedTuple):
    """``hidden [R, H]`` and ``logits [R, V]`` of a decode step, good until the next step."""

    hidden: Tensor
    logits: Tensor


class Recorder:
    """Records a model's steps, until one cannot be.

    Attributes:
        problem: why no step can be recorded; None while none was tried, or when it worked.

    Args:
        model: it records.
        steps: what it records, for the log.
    """

    def __init__(self, model: Model, steps: str) -> None:
        self.model, self._steps = model, steps
        self.problem: str | None = None

    def try_to(self, record: Callable[[], Recording]) -> Recording | None:
        """What `record` gives; None where it raises `NotRecordableError`, then and from then on."""
        try:
            if (problem := patch_problem(self.model)) is not None:
                raise NotRecordableError(problem)
            return record()
        except NotRecordableError as error:
            self.problem = str(error)
            get_logger().info(f"{self._steps} run call by call", reason=self.problem)
            return None


class _Recorded(NamedTuple):
    replay: Replay
    outputs: DecodeOutputs
    ctx: ForwardContext


class DecodeGraphs:
    """Decode steps of one runner.

    Args:
        model: it records.
        make_context: for its forward.
        refill: before each repetition.
        buffers: that steps are read from.
        capture: of the device.
    """

    def __init__(self, model: Model, make_context: MakeContext, refill: Refill, buffers: StepBuffers, capture: Capture) -> None:
        self._recorder = Recorder(model, "decode steps")
        self._make_context, self._refill, self._buffers, self._capture = make_context, refill, buffers, capture
        self._recorded: dict[int, _Recorded] = {}

    def forget(self) -> None:
        """Record again: the model may have changed."""
        self._recorded.clear()
        self._recorder.problem = None

    def run(self, step: StepRanges) -> DecodeOutputs | None:
        """Compute a step of one token a row, all of which are sampled; None where that has to be done call by call."""
        if self._recorder.problem is not None:
            return None
        rows = len(step.rows)
        size = self._capture.size(rows, self._recorded, self._buffers.ranges)
        found = self._recorded.get(size)
        self._buffers.fill(step, size if found is None else self._capture.repeated_rows(rows, size))
        if found is not None:
            self._refill(found.ctx.layers, self._buffers.batches(rows, rows, 1))
            found.replay(rows)
        elif (found := self._recorder.try_to(lambda: self._record(size))) is None:
            return None
        return DecodeOutputs(found.outputs.hidden[:rows], found.outputs.logits[:rows])

    def _record(self, rows: int) -> _Recorded:
        inputs, ctx = self._buffers.inputs(rows), self._make_context(self._buffers.batches(rows, rows, 1))
        model = self._recorder.model

        def compute() -> tuple[Tensor, Tensor]:
            hidden = model.forward(inputs, ctx).hidden
            return hidden, model.logits(hidden, ctx)

        replay, (hidden, logits) = self._capture.record(compute, rows)
        self._recorded[rows] = _Recorded(replay, DecodeOutputs(hidden, logits), ctx)
        return self._recorded[rows]
