"""Layers of equal retention share a block table, and a pool of equal blocks wastes little."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.core.kv_blocks import KVBlocks
from kvloom.interfaces import KVGroup, LayerStateSpec, StateKind
from kvloom.runtime.memory import group_layers

FULL = LayerStateSpec(StateKind.FULL, 2, 8, 8)
NOTHING = LayerStateSpec(StateKind.NONE)
SHARED = LayerStateSpec(StateKind.SHARED, shared_with=0)


def window(tokens: int) -> LayerStateSpec:
    return LayerStateSpec(StateKind.WINDOW, 2, 8, 8, window_tokens=tokens)


def sizes(specs: list[LayerStateSpec]) -> list[tuple[str, int | None, int]]:
    return [(g.kind.value, g.window_tokens, len(g.layers)) for g in group_layers(specs, 16)]


def test_one_kind_of_layer_is_one_group() -> None:
    assert group_layers([FULL] * 3, 16) == (KVGroup(0, StateKind.FULL, (0, 1, 2), 16),)


def test_windows_of_different_sizes_do_not_share() -> None:
    assert sizes([window(64), window(32), window(64), window(32)]) == [("window", 64, 2), ("window", 32, 2)]


def test_a_common_kind_is_cut_to_the_size_of_a_rare_one() -> None:
    assert sizes([FULL] * 24 + [window(64)] * 8) == [("full", None, 8)] * 3 + [("window", 64, 8)]


def test_nearly_equal_kinds_are_not_cut() -> None:
    assert sizes([FULL] * 15 + [window(64)] * 14) == [("full", None, 15), ("window", 64, 14)]


def test_layers_without_state_of_their_own_are_in_no_group() -> None:
    groups = group_layers([NOTHING, FULL, SHARED, FULL, NOTHING], 16)
    assert [g.layers for g in groups] == [(1, 3)]
    assert group_layers([NOTHING, NOTHING], 16) == ()


@given(st.lists(st.sampled_from([FULL, window(32), window(64), NOTHING, SHARED]), max_size=40))
def test_every_layer_is_in_one_group_and_at_most_a_sixteenth_is_empty(specs: list[LayerStateSpec]) -> None:
    groups = group_layers(specs, 16)
    kept = [i for i, s in enumerate(specs) if s.kind in (StateKind.FULL, StateKind.WINDOW)]
    assert sorted(i for g in groups for i in g.layers) == kept
    assert [g.index for g in groups] == list(range(len(groups)))
    for g in groups:
        assert {specs[i].retention for i in g.layers} == {(g.kind, g.window_tokens)}
        assert list(g.layers) == sorted(g.layers)
    if groups:
        assert len(groups) * max(len(g.layers) for g in groups) * 15 / 16 <= len(kept)


@given(tokens=st.integers(1, 400), window_tokens=st.integers(1, 200), block_tokens=st.sampled_from([1, 4, 16]),
       chunked=st.booleans())
def test_max_blocks_is_what_the_scheduler_counts_at_admission(tokens: int, window_tokens: int, block_tokens: int,
                                                              chunked: bool) -> None:
    groups = (KVGroup(0, StateKind.FULL, (0,), block_tokens), KVGroup(1, StateKind.WINDOW, (1,), block_tokens, window_tokens))
    kv = KVBlocks(groups, 8, cached=False)
    assert [g.max_blocks(tokens, 1 if chunked else tokens) for g in groups] == kv.needed_by_group(tokens, chunked=chunked)


@given(tokens=st.integers(1, 200), window_tokens=st.integers(1, 100), block_tokens=st.sampled_from([1, 3, 16]),
       step_tokens=st.integers(1, 64))
def test_max_blocks_bounds_what_a_window_touches(tokens: int, window_tokens: int, block_tokens: int, step_tokens: int) -> None:
    group = KVGroup(0, StateKind.WINDOW, (0,), block_tokens, window_tokens)
    for start in range(0, tokens, step_tokens):
        end = min(tokens, start + step_tokens)
        first_read = max(0, start - window_tokens + 1)
        touched = (end - 1) // block_tokens - first_read // block_tokens + 1
        assert touched <= group.max_blocks(tokens, step_tokens)


@pytest.mark.parametrize(("kind", "blocks"), [(StateKind.FULL, 7), (StateKind.LATENT, 7), (StateKind.RECURRENT, 1)])
def test_max_blocks_of_states_without_a_window(kind: StateKind, blocks: int) -> None:
    assert KVGroup(0, kind, (0,), 16).max_blocks(100) == blocks
