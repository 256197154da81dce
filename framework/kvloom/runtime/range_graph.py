"""Steps with prompts, recorded once and repeated: for as many tokens as a step has, in whatever ranges.

`graphs` does it for decode steps, whose every row is a range of one token; here the ranges are numbers in fixed memory, too.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kvloom.interfaces.attention import AttentionBatch
from kvloom.interfaces.model import ForwardContext, Model
from kvloom.runtime.batch import StepRanges
from kvloom.runtime.buffers import StepBuffers
from kvloom.runtime.capture import PlanCapture, Replay
from kvloom.runtime.graphs import MakeContext, Recorder, Refill


class _Recorded(NamedTuple):
    replay: Replay
    hidden: Tensor
    ctx: ForwardContext


class RangeGraph:
    """Steps of one runner, whatever their ranges.

    Args:
        model: it records.
        make_context: for its forward.
        refill: before each repetition.
        buffers: that steps are read from.
        capture: its memory is for one step of as many tokens as the buffers take.
    """

    def __init__(self, model: Model, make_context: MakeContext, refill: Refill, buffers: StepBuffers, capture: PlanCapture) -> None:
        self._recorder = Recorder(model, "steps with prompts")
        self._make_context, self._refill, self._buffers, self._capture = make_context, refill, buffers, capture
        self._recorded: _Recorded | None = None

    def forget(self) -> None:
        """Record again: the model may have changed."""
        self._recorded = None
        self._recorder.problem = None

    def run(self, step: StepRanges) -> Tensor | None:
        """Compute a step: its ``hidden [T, H]``, good until the next one; None where that has to be done call by call."""
        tokens, buffers = step.num_tokens, self._buffers
        if self._recorder.problem is not None or tokens > buffers.tokens or len(step.rows) > buffers.ranges:
            return None
        buffers.fill(step)
        if self._recorded is not None:
            self._refill(self._recorded.ctx.layers, self._batches())
            self._recorded.replay(tokens)
        else:
            self._recorded = self._recorder.try_to(lambda: self._record(tokens))
        return None if self._recorded is None else self._recorded.hidden[:tokens]

    def _batches(self) -> list[AttentionBatch]:
        return self._buffers.batches(self._buffers.ranges, self._buffers.tokens, self._buffers.tokens)

    def _record(self, tokens: int) -> _Recorded:
        buffers, model = self._buffers, self._recorder.model
        ctx, inputs = self._make_context(self._batches()), buffers.inputs(buffers.tokens)
        replay, (hidden,) = self._capture.record_ranges(lambda: (model.forward(inputs, ctx).hidden,), buffers.tokens, buffers.ranges,
                                                        tokens)
        return _Recorded(replay, hidden, ctx)
