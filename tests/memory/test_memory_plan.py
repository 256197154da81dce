"""The plan fits the KV cache into what there is, or refuses with a table and a value that works."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.core.kv_blocks import KVBlocks
from kvloom.errors import MemoryPlanError
from kvloom.interfaces import KVGroup, ModelConfig, StateKind
from kvloom.runtime.host_memory import DeviceMemory
from kvloom.runtime.logprobs import CHUNK_ROWS
from kvloom.runtime.memory import MemoryNeeds, MemoryPlan, activation_bytes, plan_memory

MIB = 2**20
GIB = 2**30
FULL = KVGroup(0, StateKind.FULL, (0, 1), 16)
WINDOW = KVGroup(1, StateKind.WINDOW, (2, 3), 16, 100)


def needs(**changes: object) -> MemoryNeeds:
    base = MemoryNeeds(weights_bytes=100 * MIB, activations_bytes=20 * MIB, groups=(FULL,), block_bytes=64 * 1024,
                       kv_bytes_per_token=4096, max_model_len=4096, max_num_seqs=8)
    return replace(base, **changes)


def plan(free: int = 32 * GIB, **changes: object) -> MemoryPlan:
    return plan_memory(needs(**changes), DeviceMemory(64 * GIB, free))


def apply(given: MemoryNeeds, parameter: str, value: int) -> MemoryNeeds:
    field = {"max_model_len": "max_model_len", "kv_cache_memory": "kv_cache_bytes", "num_gpu_blocks_override": "num_blocks"}
    return replace(given, **{field[parameter]: value})


def test_the_default_is_what_max_num_seqs_long_sequences_need_if_that_is_least() -> None:
    p = plan()
    assert p.num_blocks == 8 * 256 + 1
    assert p.sequences == 8
    assert p.problem is None


def test_the_default_is_at_most_4_gib() -> None:
    assert plan(max_num_seqs=10_000).cache_bytes == 4 * GIB


def test_the_default_is_at_most_a_quarter_of_what_may_still_be_used() -> None:
    p = plan(free=4 * GIB, max_num_seqs=10_000)
    assert p.cache_bytes == GIB
    assert p.budget_reason == "a quarter of what this process may still use"


def test_the_default_leaves_room_for_weights_and_activations() -> None:
    p = plan(free=GIB, weights_bytes=900 * MIB, max_model_len=1000)
    assert p.problem is None
    assert p.cache_bytes <= GIB - 920 * MIB


def test_kv_cache_memory_is_taken_as_it_is() -> None:
    assert plan(kv_cache_bytes=6 * GIB).cache_bytes == 6 * GIB


def test_num_gpu_blocks_override_wins_and_may_be_less_than_one_sequence_needs() -> None:
    p = plan(kv_cache_bytes=6 * GIB, num_blocks=10)
    assert (p.num_blocks, p.problem, p.capacity_tokens) == (10, None, 9 * 16)


def test_one_block_less_than_the_suggested_bytes_is_refused() -> None:
    given = plan(kv_cache_bytes=MIB)
    suggested = dict(given.suggestions())["kv_cache_memory"]
    assert plan(kv_cache_bytes=suggested).problem is None
    assert plan(kv_cache_bytes=suggested - given.needs.block_bytes).problem is not None


def test_one_token_more_than_the_suggested_length_is_refused() -> None:
    suggested = dict(plan(kv_cache_bytes=MIB).suggestions())["max_model_len"]
    assert plan(kv_cache_bytes=MIB, max_model_len=suggested).problem is None
    assert plan(kv_cache_bytes=MIB, max_model_len=suggested + 1).problem is not None


def test_the_refusal_is_the_table_and_the_value() -> None:
    p = plan(kv_cache_bytes=MIB)
    with pytest.raises(MemoryPlanError) as error:
        p.check()
    assert str(error.value) == p.table()
    for row in ("weights", "activations", "KV cache of one token", "KV cache wanted", "KV cache budget", "free on the device",
                "held by others"):
        assert re.search(rf"^  {row} +\d", str(error.value), re.MULTILINE), row
    assert str(error.value).splitlines()[-1] == (
        "does not fit: one sequence of max_model_len=4096 tokens does not fit into the KV cache. "
        "Set max_model_len=241, or kv_cache_memory=16842752 (16.06 MiB)")


def test_a_plan_that_fits_says_how_many_sequences() -> None:
    plan().check()
    assert plan().table().splitlines()[-1] == "fits: 8 sequences of max_model_len=4096 at once"


def test_weights_that_do_not_fit_have_no_setting_that_helps() -> None:
    p = plan(free=GIB, weights_bytes=2 * GIB)
    assert p.suggestions() == ()
    assert "No one setting changes that" in p.table()
    assert "2.04 GiB are free" in p.table()


def test_a_cache_that_is_larger_than_the_machine_is_refused_with_one_that_fits() -> None:
    p = plan(free=8 * GIB, kv_cache_bytes=100 * GIB)
    (parameter, value), = p.suggestions()
    assert parameter == "kv_cache_memory"
    assert 7 * GIB < value < 8 * GIB
    assert plan(free=8 * GIB, kv_cache_bytes=value).problem is None


def test_too_many_blocks_are_refused_with_a_number_that_fits() -> None:
    (parameter, value), = plan(free=GIB, num_blocks=10**6).suggestions()
    assert parameter == "num_gpu_blocks_override"
    assert plan(free=GIB, num_blocks=value).problem is None


def test_a_model_that_keeps_nothing_is_planned_without_a_cache() -> None:
    p = plan(groups=(), block_bytes=0, kv_bytes_per_token=0)
    assert (p.num_blocks, p.cache_bytes, p.capacity_tokens, p.sequences, p.problem) == (0, 0, 0, 8, None)
    assert "KV cache" in p.table()
    assert "no layer keeps state" in p.table()
    assert "KV cache wanted" not in p.table()


@given(free=st.integers(0, 3 * GIB), weights=st.integers(0, GIB), kv=st.none() | st.integers(0, 4 * GIB),
       blocks=st.none() | st.integers(2, 100_000), length=st.integers(2, 300_000), chunked=st.booleans(),
       groups=st.sampled_from([(FULL,), (FULL, WINDOW)]), block_bytes=st.integers(1, MIB))
def test_every_suggested_value_works(free: int, weights: int, kv: int | None, blocks: int | None, length: int, chunked: bool,
                                     groups: tuple[KVGroup, ...], block_bytes: int) -> None:
    given = needs(weights_bytes=weights, kv_cache_bytes=kv, num_blocks=blocks, max_model_len=length, groups=groups,
                  chunked=chunked, block_bytes=block_bytes)
    memory = DeviceMemory(64 * GIB, free)
    p = plan_memory(given, memory)
    if p.problem is None:
        assert p.cache_bytes + given.weights_bytes + given.activations_bytes <= free
    for parameter, value in p.suggestions():
        assert plan_memory(apply(given, parameter, value), memory).problem is None, (parameter, value)


@pytest.mark.parametrize("weights_bytes", [100 * MIB, 3 * GIB])
def test_a_suggested_value_works_with_a_little_less_free_memory(weights_bytes: int) -> None:
    values = plan(free=4 * GIB, weights_bytes=weights_bytes, max_model_len=10**7).suggestions()
    assert values
    for parameter, value in values:
        given = apply(needs(weights_bytes=weights_bytes, max_model_len=10**7), parameter, value)
        assert plan_memory(given, DeviceMemory(64 * GIB, 4 * GIB * 97 // 100)).problem is None, parameter


@given(kv=st.integers(2 * 4096, 64 * 4096), length=st.integers(2, 3000), chunked=st.booleans())
def test_a_plan_fits_exactly_when_the_scheduler_would_admit_the_longest_request(kv: int, length: int, chunked: bool) -> None:
    p = plan(kv_cache_bytes=kv, block_bytes=4096, max_model_len=length, groups=(FULL, WINDOW), chunked=chunked)
    pool = KVBlocks((FULL, WINDOW), p.num_blocks, cached=False)
    assert (p.problem is None) == (sum(pool.needed_by_group(length - 1, chunked=chunked)) <= pool.num_usable)


def test_the_activation_estimate_is_near_what_the_largest_tensors_of_a_llama_step_take() -> None:
    config = ModelConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=256)
    per_token = (3 * 64 + 3 * 256) * 4
    assert activation_bytes(config, torch.float32, 100, 80) == 100 * per_token + 80 * 1000 * 12
    assert activation_bytes(config, torch.float32, 100, 10) == 100 * per_token + CHUNK_ROWS * 1000 * 12
    assert activation_bytes(config, torch.bfloat16, 100, 1000) == 100 * per_token // 2 + 100 * 1000 * 10


@pytest.mark.parametrize("num_blocks", [None, 10])
def test_a_model_that_keeps_nothing_may_still_be_too_large(num_blocks: int | None) -> None:
    p = plan(free=110 * MIB, groups=(), block_bytes=0, kv_bytes_per_token=0, num_blocks=num_blocks)
    assert p.suggestions() == ()
    with pytest.raises(MemoryPlanError, match="No one setting changes that"):
        p.check()


def test_logits_are_counted_only_where_text_is_generated() -> None:
    config = ModelConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    with_logits, without = (activation_bytes(config, torch.float32, 64, 8, generates=g) for g in (True, False))
    assert with_logits - without == 64 * 1000 * (4 + 8)
