"""One step on one device: batch arrays -> model forward -> logits -> tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kvloom.interfaces.attention import AttentionBackend, AttentionBatch, LayerCache
from kvloom.interfaces.comm import Comm
from kvloom.interfaces.model import ForwardContext, LayerStep, Model, ModelInputs
from kvloom.interfaces.sampling import SampledTokens, Sampler, SamplingRows
from kvloom.interfaces.state import KVGroup
from kvloom.interfaces.step import RowError, RowResult, Step, StepResult
from kvloom.runtime.batch import BatchState, StepIndices
from kvloom.runtime.logits import LogitsPipeline


class Runner:
    """Runs steps of one model shard. Owns the batch state and the KV tensors; everything else it is given.

    Args:
        pipeline: the logits processors.
        backends: by layer index, the attention backend of every layer with paged state.
        caches: by layer index, its KV tensors.
    """

    def __init__(self, model: Model, sampler: Sampler, pipeline: LogitsPipeline, comm: Comm, groups: tuple[KVGroup, ...],
                 num_layers: int, backends: Mapping[int, AttentionBackend], caches: Mapping[int, LayerCache], state: BatchState,
                 device: torch.device) -> None:
        self._model, self._sampler, self._pipeline, self._comm, self._device = model, sampler, pipeline, comm, device
        self._groups, self._num_layers = groups, num_layers
        self._backends, self._caches = backends, caches
        self._state = state

    @torch.inference_mode()
    def execute(self, step: Step) -> StepResult:
        """Compute a step's ranges and sample those that ask for it."""
        self._state.apply(step)
        if not step.ranges:
            return StepResult(step.step_id, ())
        indices = self._state.indices(step)
        ctx = ForwardContext(self._comm, self._layer_steps(indices))
        inputs = ModelInputs(token_ids=self._to_device(indices.token_ids), positions=self._to_device(indices.positions)[None])
        hidden = self._model.forward(inputs, ctx).hidden
        sampled: dict[int, RowResult] = {}
        if len(indices.sampled):
            last = self._to_device(indices.query_starts[indices.sampled + 1].astype(np.int64) - 1)
            logits = self._model.logits(hidden[last], ctx).float()
            sampled = self._sample(step, indices, logits)
        return StepResult(step.step_id, tuple(sampled.get(i) or RowResult(r.sequence_id) for i, r in enumerate(step.ranges)))

    def _layer_steps(self, indices: StepIndices) -> Sequence[LayerStep | None]:
        """Prepare each group once per backend, and hand every layer its backend, cache and metadata."""
        steps: list[LayerStep | None] = [None] * self._num_layers
        contexts, starts = self._to_device(indices.context_tokens), self._to_device(indices.query_starts)
        for group, group_indices in zip(self._groups, indices.groups, strict=True):
            batch = AttentionBatch(
                query_starts=starts,
                context_tokens=contexts,
                block_table=self._to_device(group_indices.block_table),
                slots=self._to_device(group_indices.slots),
                query_starts_host=indices.query_starts,
                context_tokens_host=indices.context_tokens,
                max_query_tokens=int(np.diff(indices.query_starts).max()),
                max_context_tokens=int(indices.context_tokens.max()),
            )
            prepared = {id(b): b.prepare(batch) for b in {id(self._backends[i]): self._backends[i] for i in group.layers}.values()}
            for i in group.layers:
                steps[i] = LayerStep(self._backends[i], self._caches[i], prepared[id(self._backends[i])])
        return steps

    def _sample(self, step: Step, indices: StepIndices, logits: torch.Tensor) -> dict[int, RowResult]:
        """Sample every asking range's last row, remember the tokens, and return results by index into the ranges."""
        rows = indices.rows[indices.sampled]
        positions = indices.context_tokens[indices.sampled].astype(np.int64)
        ranges = [step.ranges[i] for i in indices.sampled]
        processors = [self._state.processors[row] for row in rows]
        logits = self._pipeline.apply(logits, processors)
        done = self._sampler.sample(logits, SamplingRows(
            sequence_ids=np.array([r.sequence_id for r in ranges]),
            row_starts=np.arange(len(ranges) + 1),
            params=[p for p in (self._state.params[row] for row in rows) if p is not None],
            temperatures=self._state.temperatures[rows],
            seeds=self._state.seeds[rows],
            sample_indices=self._state.sample_indices[rows],
            positions=positions,
        ))
        token_ids = done.token_ids.cpu().numpy()
        self._state.write_sampled(rows, positions, token_ids)
        for sequence, token_id in zip(processors, token_ids.tolist(), strict=True):
            if sequence.states:
                self._pipeline.advance(sequence, (token_id,))
        return {int(i): _row_result(r.sequence_id, s, token, done) for s, (i, r, token)
                in enumerate(zip(indices.sampled, ranges, token_ids.tolist(), strict=True))}

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        """On the CPU the tensor shares the array's memory."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


def _row_result(sequence_id: int, index: int, token_id: int, done: SampledTokens) -> RowResult:
    """The sampled token, or the reason why this row could not be sampled."""
    reason = done.failed.get(index)
    if reason is not None:
        return RowResult(sequence_id, error=RowError("RequestFailedError", reason))
    return RowResult(sequence_id, (token_id,))
