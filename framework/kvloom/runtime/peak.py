"""The largest step that an engine can be asked for, without any request: what it takes is measured before the KV cache is made."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvloom.config import EngineConfig
from kvloom.interfaces.comm import Comm
from kvloom.interfaces.model import Model
from kvloom.interfaces.state import KVGroup
from kvloom.runtime.batch import StepRanges
from kvloom.runtime.builder import BuiltModel, ModelSource
from kvloom.runtime.device import ComputeDevice
from kvloom.runtime.forward import Forward, LayerState
from kvloom.runtime.kv_tensors import allocate
from kvloom.runtime.logprobs import CHUNK_ROWS
from kvloom.runtime.tables import SequenceTables
from kvloom_kernels.sampling import best, draw, token_logprobs, top_p


class LargestStep:
    """A prompt step over as many tokens as there can be, all of whose results nobody wants.

    Args:
        layers: with caches of at least one block: everything is written to block 0, which is nobody's.
        tokens: of a step.
        rows: that are sampled in one step at most.
        max_model_len: of one sequence.
        generates: whether rows are sampled.
    """

    def __init__(self, model: Model, comm: Comm, layers: LayerState, device: ComputeDevice, *, tokens: int, rows: int,
                 max_model_len: int, generates: bool) -> None:
        self._model, self._device, self.tokens, self._generates = model, device, tokens, generates
        self._rows = min(max(rows, CHUNK_ROWS), tokens)
        self._comm, self._layers, self._max_num_seqs, self._max_model_len = comm, layers, rows, max_model_len

    @torch.inference_mode()
    def run(self) -> None:
        """Compute it, up to candidates of every sampled row, with the tables that an engine keeps beside its cache."""
        model, device, layers = self._model, self._device, self._layers
        tables = SequenceTables(device, self._max_num_seqs, self._max_model_len, layers.groups, tuple(model.extra_inputs))
        forward = Forward(model, self._comm, layers, tables, device)
        computed = forward.run(largest_ranges(tables, self.tokens, self._max_model_len))
        if self._generates:
            sample_all(model.logits(computed.hidden[:self._rows], computed.ctx), device)


def largest_step(built: BuiltModel, source: ModelSource, config: EngineConfig, groups: tuple[KVGroup, ...], comm: Comm) -> LargestStep:
    """That of an engine."""
    device, limits = source.device, config.limits(source.max_model_len, chunkable=built.model.chunkable)
    shapes = {layer: built.backends[layer].state_shapes() for group in groups for layer in group.layers}
    caches = allocate(groups, shapes, 1, device.torch_device)
    return LargestStep(
        built.model, comm, LayerState(groups, len(built.model.state_specs()), built.backends, caches), device,
        tokens=limits.max_num_batched_tokens, rows=limits.max_num_seqs, max_model_len=limits.max_model_len,
        generates=source.pooling is None)


def sample_all(logits: Tensor, device: ComputeDevice) -> None:
    """What sampling can take at most, of our own: ``logits [S, V]`` are kept, filtered, drawn from, and searched for candidates."""
    rows = len(logits)
    filtered = top_p(logits.float().clone(), device.put(np.full(rows, 0.9, np.float32)))
    largest, _ = best(filtered)
    token_ids = draw(filtered, largest, device.put(np.full(rows, 0.5)))
    token_logprobs(logits, token_ids, min(20, logits.shape[1]))


def largest_ranges(tables: SequenceTables, tokens: int, max_model_len: int) -> StepRanges:
    """Sequences as long as they may be that together have so many tokens, nothing of them computed yet. They are nobody's."""
    starts = np.array([*range(0, tokens, max_model_len), tokens], np.int32)
    counts = np.diff(starts)
    return StepRanges(np.full(len(counts), tables.nobody), starts, counts, np.arange(0))
