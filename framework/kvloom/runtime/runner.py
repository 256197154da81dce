"""One step on one device: batch arrays -> model forward -> logits -> tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np
import torch

from kvloom.errors import InternalError
from kvloom.interfaces.attention import AttentionBackend, AttentionBatch, LayerCache
from kvloom.interfaces.comm import Comm
from kvloom.interfaces.model import ForwardContext, LayerStep, Model, ModelInputs
from kvloom.interfaces.sampling import Sampler
from kvloom.interfaces.state import KVGroup
from kvloom.interfaces.step import RowResult, Step, StepResult
from kvloom.runtime.batch import BatchState, GroupIndices, StepIndices
from kvloom.runtime.grammar import MaskFiller, StepMasks
from kvloom.runtime.host_blocks import HostBlocks
from kvloom.runtime.logits import LogitsPipeline
from kvloom.runtime.logprobs import Candidates
from kvloom.runtime.pooling import RowPooler
from kvloom.runtime.sampling import LogitsOf, RowSampler

NO_GROUP = GroupIndices(np.zeros((0, 0), np.int32), np.zeros(0, np.int64))
"""Of layers that keep nothing."""


class Runner:
    """Runs steps of one model shard. Owns the batch state and the KV tensors; everything else it is given.

    Args:
        pipeline: the logits processors.
        pooler: of an engine that pools; None: it generates.
        backends: by layer index, the attention backend of every attention layer.
        caches: by layer index, the KV tensors of those that keep state.
        host_blocks: where blocks go that leave the device; None where none do.
    """

    def __init__(self, model: Model, sampler: Sampler, pipeline: LogitsPipeline, comm: Comm, groups: tuple[KVGroup, ...],
                 num_layers: int, backends: Mapping[int, AttentionBackend], caches: Mapping[int, LayerCache], state: BatchState,
                 device: torch.device, host_blocks: HostBlocks | None = None, pooler: RowPooler | None = None) -> None:
        self._model, self._comm, self._device = model, comm, device
        self._groups, self._num_layers = groups, num_layers
        self._backends, self._caches = backends, caches
        self._unstored = tuple(i for i, backend in backends.items() if not backend.spec.stored)
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
        indices = self._state.indices(step)
        masks = self._masks.begin([self._state.processors[row].grammar for row in indices.rows[indices.sampled]])
        ctx = ForwardContext(self._comm, self._layer_steps(indices))
        inputs = ModelInputs(
            token_ids=self._to_device(indices.token_ids), positions=self._to_device(indices.positions)[None],
            extras={name: self._to_device(values) for name, values in indices.extras.items()})
        hidden = self._model.forward(inputs, ctx).hidden
        if self._pooler is not None:
            return StepResult(step.step_id, tuple(self._pool(self._pooler, step, indices, hidden, ctx)))

        def logits_of(rows: torch.Tensor) -> torch.Tensor:
            return self._model.logits(rows, ctx)

        prompt_rows = self._prompt_logprobs(step, indices, hidden, logits_of)
        sampled = self._sample(step, indices, hidden, logits_of, masks)
        rows = [sampled.get(i) or RowResult(r.sequence_id) for i, r in enumerate(step.ranges)]
        for i, found in prompt_rows.items():
            rows[i] = rows[i]._replace(prompt_logprobs=found)
        return StepResult(step.step_id, tuple(rows))

    def close(self) -> None:
        """End its thread."""
        self._masks.close()

    def _move_blocks(self, step: Step) -> None:
        if self._host_blocks is None:
            raise InternalError(f"step {step.step_id} moves blocks, but this worker has none on the host")
        self._host_blocks.apply(step)

    def _layer_steps(self, indices: StepIndices) -> Sequence[LayerStep | None]:
        """Prepare each group once per backend, and hand every layer its backend, cache and metadata."""
        steps: list[LayerStep | None] = [None] * self._num_layers
        contexts, starts = self._to_device(indices.context_tokens), self._to_device(indices.query_starts)
        parts = [(group.layers, g) for group, g in zip(self._groups, indices.groups, strict=True)]
        if self._unstored:
            parts.append((self._unstored, NO_GROUP))
        for layers, group in parts:
            batch = AttentionBatch(
                query_starts=starts,
                context_tokens=contexts,
                block_table=self._to_device(group.block_table),
                slots=self._to_device(group.slots),
                query_starts_host=indices.query_starts,
                context_tokens_host=indices.context_tokens,
                max_query_tokens=int(np.diff(indices.query_starts).max()),
                max_context_tokens=int(indices.context_tokens.max()),
            )
            prepared = {id(b): b.prepare(batch) for b in {id(self._backends[i]): self._backends[i] for i in layers}.values()}
            for i in layers:
                cache = self._caches[i] if group is not NO_GROUP else LayerCache(i, ())
                steps[i] = LayerStep(self._backends[i], cache, prepared[id(self._backends[i])])
        return steps

    def _sample(self, step: Step, indices: StepIndices, hidden: torch.Tensor, logits_of: LogitsOf,
                masks: Future[StepMasks] | None) -> dict[int, RowResult]:
        """Sample every asking range's last row; results by index into the ranges."""
        if not len(indices.sampled):
            return {}
        last = self._to_device(indices.query_starts[indices.sampled + 1].astype(np.int64) - 1)
        positions = indices.context_tokens[indices.sampled].astype(np.int64)
        ranges = [step.ranges[i] for i in indices.sampled]
        results = self._rows.sample(ranges, indices.rows[indices.sampled], positions, hidden[last], logits_of,
                                    None if masks is None else masks.result())
        return dict(zip(indices.sampled.tolist(), results, strict=True))

    def _pool(self, pooler: RowPooler, step: Step, indices: StepIndices, hidden: torch.Tensor, ctx: ForwardContext) -> list[RowResult]:
        """Results of all ranges, in their order; states of the poolers change when all of them are there."""
        rows = indices.rows.tolist()
        states = [s for s in (self._state.pooling[row] for row in rows) if s is not None]
        results, after = pooler.pool(step.ranges, states, indices.query_starts.tolist(), hidden, ctx)
        for row, state in zip(rows, after, strict=True):
            self._state.pooling[row] = state
        return results

    def _prompt_logprobs(self, step: Step, indices: StepIndices, hidden: torch.Tensor,
                         logits_of: LogitsOf) -> dict[int, tuple[Candidates, ...]]:
        """Of the ranges whose requests ask for them, by index into the ranges."""
        out: dict[int, tuple[Candidates, ...]] = {}
        for i in np.flatnonzero(self._state.num_prompt_candidates[indices.rows] >= 0).tolist():
            part = slice(int(indices.query_starts[i]), int(indices.query_starts[i + 1]))
            found = self._rows.prompt_logprobs(step.ranges[i], int(indices.rows[i]), hidden[part], logits_of)
            if found is not None:
                out[i] = found
        return out

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        """On the CPU the tensor shares the array's memory."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)
