"""Steps with prompts, recorded once and repeated: for as many tokens as a step has, in whatever ranges.

`graphs` does it for decode steps, whose every row is a range of one token; here the ranges are numbers in fixed memory, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from kvloom.interfaces.attention import AttentionBatch
from kvloom.interfaces.model import ForwardContext, Model, ModelInputs
from kvloom.runtime.batch import StepIndices
from kvloom.runtime.capture import PlanCapture, Replay
from kvloom.runtime.device import ComputeDevice, FixedShape, fixed_arrays
from kvloom.runtime.graphs import MakeContext, Recorder, Refill


class RangeBuffers:
    """The inputs of steps of up to `tokens` tokens in up to `ranges` ranges, at fixed addresses. The device is the host.

    Args:
        widths: blocks of the longest table, by KV group.
        longest_tokens: of any context.
    """

    def __init__(self, tokens: int, ranges: int, widths: Sequence[int], longest_tokens: int, device: ComputeDevice) -> None:
        self.tokens, self.ranges = tokens, ranges
        shapes: list[FixedShape] = [((tokens,), "int64")] * (2 + len(widths))
        shapes += [((ranges,), "int32"), ((ranges + 1,), "int32"), *(((ranges, width), "int32") for width in widths)]
        _, arrays = fixed_arrays(device, shapes)
        self._token_ids, self._positions, *groups = arrays
        self._slots, of_ranges = groups[:len(widths)], groups[len(widths):]
        self._contexts, self._starts, *self._tables = of_ranges
        self.inputs = ModelInputs(self._token_ids.device, self._positions.device[None])
        self.batches = [AttentionBatch(
            query_starts=self._starts.device, context_tokens=self._contexts.device, block_table=table.device, slots=slots.device,
            query_starts_host=self._starts.host, context_tokens_host=self._contexts.host,
            max_query_tokens=tokens, max_context_tokens=longest_tokens,
        ) for table, slots in zip(self._tables, self._slots, strict=True)]

    def fill(self, indices: StepIndices) -> None:
        """Take over a step's numbers. Ranges beyond it are empty."""
        tokens, ranges = len(indices.token_ids), len(indices.rows)
        self._token_ids.host[:tokens], self._positions.host[:tokens] = indices.token_ids, indices.positions
        self._contexts.host[:ranges], self._contexts.host[ranges:] = indices.context_tokens, 0
        self._starts.host[:ranges + 1], self._starts.host[ranges + 1:] = indices.query_starts, tokens
        for table, slots, group in zip(self._tables, self._slots, indices.groups, strict=True):
            table.host[:ranges, :group.block_table.shape[1]] = group.block_table
            slots.host[:tokens] = group.slots


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

    def __init__(self, model: Model, make_context: MakeContext, refill: Refill, buffers: RangeBuffers, capture: PlanCapture) -> None:
        self._recorder = Recorder(model, "steps with prompts")
        self._make_context, self._refill, self._buffers, self._capture = make_context, refill, buffers, capture
        self._recorded: _Recorded | None = None

    def forget(self) -> None:
        """Record again: the model may have changed."""
        self._recorded = None
        self._recorder.problem = None

    def run(self, indices: StepIndices) -> Tensor | None:
        """Compute a step: its ``hidden [T, H]``, good until the next one; None where that has to be done call by call."""
        tokens, buffers = len(indices.token_ids), self._buffers
        if self._recorder.problem is not None or tokens > buffers.tokens or len(indices.rows) > buffers.ranges:
            return None
        buffers.fill(indices)
        if self._recorded is not None:
            self._refill(self._recorded.ctx.layers, buffers.batches)
            self._recorded.replay(tokens)
        else:
            self._recorded = self._recorder.try_to(lambda: self._record(tokens))
        return None if self._recorded is None else self._recorded.hidden[:tokens]

    def _record(self, tokens: int) -> _Recorded:
        buffers, model = self._buffers, self._recorder.model
        ctx = self._make_context(buffers.batches)
        replay, (hidden,) = self._capture.record_ranges(lambda: (model.forward(buffers.inputs, ctx).hidden,), buffers.tokens,
                                                        buffers.ranges, tokens)
        return _Recorded(replay, hidden, ctx)
