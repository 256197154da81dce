"""Block copies of a step: as if one after the other, in the layers of their group only, and once however often the step comes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.interfaces import BlockCopy, KVGroup, LayerCache, NewSequence, StateKind, Step, TokenRange
from kvloom.params import SamplingParams
from kvloom.runtime.batch import BatchState
from kvloom.runtime.buffers import StepBuffers
from kvloom.runtime.device import CpuDevice
from kvloom.runtime.kv_tensors import copy_blocks
from kvloom.runtime.tables import SequenceTables

GROUPS = (KVGroup(0, StateKind.FULL, (0, 2), 4), KVGroup(1, StateKind.WINDOW, (1,), 4, 8))


def make_caches(dtype: torch.dtype) -> dict[int, LayerCache]:
    generator = torch.Generator().manual_seed(0)
    return {i: LayerCache(i, (torch.randn(8, 4, 3, generator=generator).to(dtype), torch.randn(8, 5, generator=generator).to(dtype)))
            for i in range(3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 7), st.integers(0, 7)), max_size=6))
def test_copies_are_made_in_their_order(dtype: torch.dtype, pairs: list) -> None:
    caches, expected = make_caches(dtype), make_caches(dtype)
    for group, source, target in pairs:
        for layer in GROUPS[group].layers:
            for tensor in expected[layer].tensors:
                tensor[target] = tensor[source].clone()
    copy_blocks(GROUPS, caches, [BlockCopy(g, s, t, 0) for g, s, t in pairs])
    for layer, cache in caches.items():
        for found, wanted in zip(cache.tensors, expected[layer].tensors, strict=True):
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_a_step_that_comes_again_copies_nothing_and_gives_its_tokens_again() -> None:
    seen: list = []
    tables = SequenceTables(CpuDevice(), 4, 32, GROUPS[:1])
    state = BatchState(tables, copy=seen.append)
    buffers = StepBuffers(tables, 4, 8, 32, CpuDevice())
    params = SamplingParams(temperature=0)
    state.apply(Step(0, (TokenRange(5, 0, 6, sample=True),), new=(NewSequence(5, (1, 2, 3, 4, 5, 6), 6, 0, ((1, 2),), params),)))
    state.write_sampled(np.array([0]), np.array([6]), torch.tensor([99]))
    step = Step(1, (TokenRange(5, 6, 1, sample=True, given=(7,)),), copies=(BlockCopy(0, 2, 3, 5),))
    for attempt in (step, step.only(step.ranges[0])):
        state.apply(attempt)
        buffers.fill(state.flatten(attempt))
        (batch,) = buffers.batches(1, 1, 1)
        assert buffers.inputs(1).token_ids.tolist() == [7]
        assert batch.block_table[:, :2].tolist() == [[1, 3]]
        assert batch.slots.tolist() == [3 * 4 + 2]
    assert seen == [step.copies]
