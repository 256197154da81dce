"""A step's forward: from how it cuts its sequences to hidden states and logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kvloom.interfaces.attention import AttentionBackend, AttentionBatch, LayerCache
from kvloom.interfaces.comm import Comm
from kvloom.interfaces.model import ForwardContext, LayerStep, Model, ModelInputs
from kvloom.interfaces.state import KVGroup
from kvloom.runtime.batch import StepRanges
from kvloom.runtime.buffers import StepBuffers, attention_batches
from kvloom.runtime.device import ComputeDevice, aligned
from kvloom.runtime.graphs import DecodeGraphs
from kvloom.runtime.range_graph import RangeGraph
from kvloom.runtime.tables import SequenceTables
from kvloom_kernels.gather import Ranges
from kvloom_kernels.scratch import scratch_from


class LayerState(NamedTuple):
    """What the layers of one model shard work with.

    Args:
        groups: KV groups.
        num_layers: layers in all.
        backends: by layer index, the attention backend of every attention layer.
        caches: by layer index, the KV tensors of those that keep state.
    """

    groups: tuple[KVGroup, ...]
    num_layers: int
    backends: Mapping[int, AttentionBackend]
    caches: Mapping[int, LayerCache]

    @property
    def unstored(self) -> tuple[int, ...]:
        """Attention layers that keep nothing."""
        return tuple(i for i, backend in self.backends.items() if not backend.spec.stored)

    def steps(self, batches: Sequence[AttentionBatch]) -> Sequence[LayerStep | None]:
        """Prepare each group once per backend, and hand every layer its backend, cache and metadata.

        Args:
            batches: one a group, then one for layers that keep nothing, where there are any.
        """
        steps: list[LayerStep | None] = [None] * self.num_layers
        for layers, batch in self._by_batch(batches):
            prepared = {id(b): b.prepare(batch) for b in {id(self.backends[i]): self.backends[i] for i in layers}.values()}
            for i in layers:
                steps[i] = LayerStep(self.backends[i], self.caches.get(i) or LayerCache(i, ()), prepared[id(self.backends[i])])
        return steps

    def refill(self, steps: Sequence[LayerStep | None], batches: Sequence[AttentionBatch]) -> None:
        """Bring metadata that `steps` prepared up to date with other numbers in the batches' memory, for as many rows or fewer."""
        for layers, batch in self._by_batch(batches):
            once = {id(step.meta): step for i in layers if (step := steps[i]) is not None}
            for step in once.values():
                step.backend.prepare(batch, out=step.meta)

    def _by_batch(self, batches: Sequence[AttentionBatch]) -> Iterator[tuple[Sequence[int], AttentionBatch]]:
        return zip((*(g.layers for g in self.groups), self.unstored), batches, strict=False)


class Computed(NamedTuple):
    """``hidden [T, H]``, and ``logits [R, V]`` of rows that are all sampled, where they came along; good until the next step."""

    hidden: Tensor
    ctx: ForwardContext
    logits: Tensor | None = None


class Forward:
    """Runs a model shard on steps.

    Attributes:
        device: it runs on.

    Args:
        layers: what its layers work with.
        tables: that steps are gathered from.
        recorded_bytes: memory for recorded decode steps; 0 records none.
        scratch_bytes: memory for what other steps compute; what does not fit is allocated step by step, on fresh pages.
        max_num_seqs, max_model_len, max_num_batched_tokens: limits of steps that are recorded.
    """

    def __init__(self, model: Model, comm: Comm, layers: LayerState, tables: SequenceTables, device: ComputeDevice, *,
                 recorded_bytes: int = 0, scratch_bytes: int = 0, max_num_seqs: int = 1, max_model_len: int = 1,
                 max_num_batched_tokens: int = 1) -> None:
        self._model, self._comm, self._layers, self._tables, self.device = model, comm, layers, tables, device
        self._unstored = [tables.no_group()] if layers.unstored else []
        # Not that of recorded steps: whoever keeps a tensor of this one keeps its memory.
        self._scratch = device.scratch(scratch_bytes) if scratch_bytes else None
        self._graphs: DecodeGraphs | None = None
        self._range_graph: RangeGraph | None = None
        backends = layers.backends.values()
        if recorded_bytes and all(b.graph_support and b.spec.stored for b in backends):
            buffers = StepBuffers(tables, max_num_seqs, max_num_batched_tokens, max_model_len, device)
            self._graphs = DecodeGraphs(model, self._context, layers.refill, buffers, device.capture(recorded_bytes))
            if max_num_batched_tokens > 1 and all(b.range_graph_support for b in backends):
                capture = device.range_capture(scratch_bytes)
                self._range_graph = None if capture is None else RangeGraph(model, self._context, layers.refill, buffers, capture)
        if self._scratch is not None and self._range_graph is None:
            self._scratch.touch()

    def run(self, step: StepRanges) -> Computed:
        """Compute a step."""
        if self._graphs is not None and step.one_each:
            done = self._graphs.run(step)
            if done is not None:
                return Computed(done.hidden, ForwardContext(self._comm, ()), done.logits)
        if self._range_graph is not None:
            hidden = self._range_graph.run(step)
            if hidden is not None:
                return Computed(hidden, ForwardContext(self._comm, ()))
        inputs, batches = self._gathered(step)
        ctx = self._context(batches)
        with scratch_from(self._scratch):
            return Computed(self._model.forward(inputs, ctx).hidden, ctx)

    def forget_recorded(self) -> None:
        """See `Worker.forget_recorded`."""
        for recorded in (self._graphs, self._range_graph):
            if recorded is not None:
                recorded.forget()

    def close(self) -> None:
        """Let go of recorded steps, which refer to the model and to this."""
        self._graphs = self._range_graph = None

    def _context(self, batches: Sequence[AttentionBatch]) -> ForwardContext:
        return ForwardContext(self._comm, self._layers.steps(batches))

    def _gathered(self, step: StepRanges) -> tuple[ModelInputs, list[AttentionBatch]]:
        """Inputs of a step that is not recorded; the batches are one a KV group, and one more for layers that keep nothing."""
        count, max_context = len(step.rows), int(step.context_tokens.max())
        numbers = np.zeros((3, aligned(count + 1)), np.int32)
        numbers[0, :count], numbers[1, :count + 1], numbers[2, :count] = step.rows, step.query_starts, step.context_tokens
        rows, starts, contexts = self.device.put(numbers)
        ranges = Ranges(rows[:count], starts[:count + 1], contexts[:count])
        tensors = self._tables.tensors(count, step.num_tokens, self._tables.columns(max_context))
        self._tables.gather(ranges, tensors)
        groups = (*tensors.groups, *self._unstored)
        batches = attention_batches(ranges, groups, step.query_starts, step.context_tokens, int(np.diff(step.query_starts).max()),
                                    max_context)
        return ModelInputs(tensors.token_ids, tensors.places.positions[None], extras=tensors.extras), batches
