"""A step's forward: from index arrays to hidden states and logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kvloom.interfaces.attention import AttentionBackend, AttentionBatch, LayerCache
from kvloom.interfaces.comm import Comm
from kvloom.interfaces.model import ForwardContext, LayerStep, Model, ModelInputs
from kvloom.interfaces.state import KVGroup
from kvloom.runtime.batch import GroupIndices, StepIndices
from kvloom.runtime.device import ComputeDevice
from kvloom.runtime.graphs import Buffers, DecodeGraphs
from kvloom.runtime.range_graph import RangeBuffers, RangeGraph
from kvloom_kernels.scratch import scratch_from

NO_GROUP = GroupIndices(np.zeros((0, 0), np.int32), np.zeros(0, np.int64))
"""Of layers that keep nothing."""


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
        recorded_bytes: memory for recorded decode steps; 0 records none.
        scratch_bytes: memory for what other steps compute; what does not fit is allocated step by step, on fresh pages.
        max_num_seqs, max_model_len, max_num_batched_tokens: limits of steps that are recorded.
    """

    def __init__(self, model: Model, comm: Comm, layers: LayerState, device: ComputeDevice, *, recorded_bytes: int = 0,
                 scratch_bytes: int = 0, max_num_seqs: int = 1, max_model_len: int = 1, max_num_batched_tokens: int = 1) -> None:
        self._model, self._comm, self._layers, self.device = model, comm, layers, device
        self._has_unstored = bool(layers.unstored)
        # Not that of recorded steps: whoever keeps a tensor of this one keeps its memory.
        self._scratch = device.scratch(scratch_bytes) if scratch_bytes else None
        self._graphs: DecodeGraphs | None = None
        self._range_graph: RangeGraph | None = None
        widths, backends = [-(-max_model_len // g.block_tokens) for g in layers.groups], layers.backends.values()
        if recorded_bytes and all(b.graph_support and b.spec.stored for b in backends):
            self._graphs = DecodeGraphs(model, self._context, layers.refill, Buffers(max_num_seqs, widths, max_model_len, device),
                                        device.capture(recorded_bytes))
            if max_num_batched_tokens > 1 and all(b.range_graph_support for b in backends):
                capture = device.range_capture(scratch_bytes)
                self._range_graph = None if capture is None else RangeGraph(
                    model, self._context, layers.refill,
                    RangeBuffers(max_num_batched_tokens, max_num_seqs, widths, max_model_len, device), capture)
        if self._scratch is not None and self._range_graph is None:
            self._scratch.touch()

    def run(self, indices: StepIndices) -> Computed:
        """Compute a step."""
        one_each = len(indices.token_ids) == len(indices.rows) == len(indices.sampled)
        if self._graphs is not None and one_each and not indices.extras:
            done = self._graphs.run(indices)
            if done is not None:
                return Computed(done.hidden, ForwardContext(self._comm, ()), done.logits)
        if self._range_graph is not None and not indices.extras:
            hidden = self._range_graph.run(indices)
            if hidden is not None:
                return Computed(hidden, ForwardContext(self._comm, ()))
        ctx = self._context(self._batches(indices))
        inputs = ModelInputs(
            token_ids=self.device.put(indices.token_ids), positions=self.device.put(indices.positions)[None],
            extras={name: self.device.put(values) for name, values in indices.extras.items()})
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

    def _batches(self, indices: StepIndices) -> list[AttentionBatch]:
        """By KV group, and one more for layers that keep nothing."""
        contexts, starts = self.device.put(indices.context_tokens), self.device.put(indices.query_starts)
        return [AttentionBatch(
            query_starts=starts,
            context_tokens=contexts,
            block_table=self.device.put(group.block_table),
            slots=self.device.put(group.slots),
            query_starts_host=indices.query_starts,
            context_tokens_host=indices.context_tokens,
            max_query_tokens=int(np.diff(indices.query_starts).max()),
            max_context_tokens=int(indices.context_tokens.max()),
        ) for group in (*indices.groups, *([NO_GROUP] if self._has_unstored else ()))]
