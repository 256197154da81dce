"""One step on one device: how it cuts its sequences -> model forward -> logits -> tokens."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import torch

from kvloom.errors import InternalError
from kvloom.interfaces.model import Model
from kvloom.interfaces.sampling import Sampler
from kvloom.interfaces.step import RowResult, Step, StepResult
from kvloom.runtime.batch import BatchState, StepRanges
from kvloom.runtime.forward import Computed, Forward
from kvloom.runtime.grammar import MaskFiller, StepMasks
from kvloom.runtime.host_blocks import HostBlocks
from kvloom.runtime.logits import LogitsPipeline
from kvloom.runtime.logprobs import Candidates, Found, arrived
from kvloom.runtime.outbox import Outbox
from kvloom.runtime.pooling import RowPooler
from kvloom.runtime.sampling import RowSampler


class Runner:
    """Runs steps of one model shard. Owns the batch state; everything else it is given.

    Args:
        forward: of the model.
        pipeline: the logits processors.
        pooler: of an engine that pools; None: it generates.
        host_blocks: where blocks go that leave the device; None where none do.
    """

    def __init__(self, model: Model, forward: Forward, sampler: Sampler, pipeline: LogitsPipeline, state: BatchState,
                 host_blocks: HostBlocks | None = None, pooler: RowPooler | None = None) -> None:
        self._model, self._forward = model, forward
        self._state, self._host_blocks = state, host_blocks
        self._rows = RowSampler(sampler, pipeline, state)
        self._masks = MaskFiller()
        self._pooler = pooler

    @torch.inference_mode()
    def execute(self, step: Step) -> StepResult:
        """Compute a step's ranges and sample those that ask for it. See `Worker.execute` about what comes again."""
        self._state.apply(step)
        if step.swap_out or step.swap_in:
            self._move_blocks(step)
        if not step.ranges:
            return StepResult(step.step_id, ())
        ranges = self._state.flatten(step)
        masks = self._masks.begin([self._state.processors[row].grammar for row in ranges.rows[ranges.sampled]])
        computed = self._forward.run(ranges)
        outbox = Outbox(self._forward.device.fetch)
        if self._pooler is not None:
            return StepResult(step.step_id, tuple(self._pool(self._pooler, step, ranges, computed, outbox)))
        prompt_rows = self._prompt_logprobs(step, ranges, computed, outbox)
        sampled = self._sample(step, ranges, computed, outbox, masks)
        rows = [sampled.get(i) or RowResult(r.sequence_id) for i, r in enumerate(step.ranges)]
        for i, found in prompt_rows.items():
            rows[i] = rows[i]._replace(prompt_logprobs=_in_order(found))
        return StepResult(step.step_id, tuple(rows))

    def forget_recorded(self) -> None:
        """See `Worker.forget_recorded`."""
        self._forward.forget_recorded()

    def close(self) -> None:
        """End its thread, and let go of what it recorded."""
        self._masks.close()
        self._forward.close()

    def _move_blocks(self, step: Step) -> None:
        if self._host_blocks is None:
            raise InternalError(f"step {step.step_id} moves blocks, but this worker has none on the host")
        self._host_blocks.apply(step)

    def _sample(self, step: Step, ranges: StepRanges, computed: Computed, outbox: Outbox,
                masks: Future[StepMasks] | None) -> dict[int, RowResult]:
        """Sample every asking range's last row; results by index into the ranges."""
        if not len(ranges.sampled):
            return {}

        def logits() -> torch.Tensor:
            last = self._forward.device.put(ranges.query_starts[ranges.sampled + 1].astype(np.int64) - 1)
            return self._model.logits(computed.hidden[last], computed.ctx)

        positions = ranges.context_tokens[ranges.sampled].astype(np.int64)
        sampled = [step.ranges[i] for i in ranges.sampled]
        results = self._rows.sample(sampled, ranges.rows[ranges.sampled], positions,
                                    logits() if computed.logits is None else computed.logits, logits, outbox,
                                    None if masks is None else masks.result())
        return dict(zip(ranges.sampled.tolist(), results, strict=True))

    def _pool(self, pooler: RowPooler, step: Step, ranges: StepRanges, computed: Computed, outbox: Outbox) -> list[RowResult]:
        """Results of all ranges, in their order; states of the poolers change when all of them are there."""
        rows = ranges.rows.tolist()
        states = [s for s in (self._state.pooling[row] for row in rows) if s is not None]
        results, after = pooler.pool(step.ranges, states, ranges.query_starts.tolist(), computed.hidden, computed.ctx, outbox)
        for row, state in zip(rows, after, strict=True):
            self._state.pooling[row] = state
        return results

    def _prompt_logprobs(self, step: Step, ranges: StepRanges, computed: Computed,
                         outbox: Outbox) -> dict[int, list[list[Found]]]:
        """Of the ranges whose requests ask for them, by index into the ranges."""
        def logits_of(hidden: torch.Tensor) -> torch.Tensor:
            return self._model.logits(hidden, computed.ctx)

        out: dict[int, list[list[Found]]] = {}
        for i in np.flatnonzero(self._state.num_prompt_candidates[ranges.rows] >= 0).tolist():
            part = slice(int(ranges.query_starts[i]), int(ranges.query_starts[i + 1]))
            found = self._rows.prompt_logprobs(step.ranges[i], int(ranges.rows[i]), computed.hidden[part], logits_of,
                                               outbox)
            if found is not None:
                out[i] = found
        return out


def _in_order(parts: list[list[Found]]) -> tuple[Candidates, ...]:
    return tuple(row for part in parts for _, row in sorted(arrived(part).items()))
