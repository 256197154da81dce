"""A step's numbers, gathered from tables: the plain references against loops over tokens, also on a GPU, and the C++ kernels against them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import has_gpu

from kvloom_kernels import gather
from kvloom_kernels.gather import Places, Ranges, gather_blocks, gather_blocks_reference, gather_tokens, gather_tokens_reference
from kvloom_kernels.native import problem
from kvloom_kernels.plan import NotRecordableError, Plan, recorded

DEVICES = ["cpu", "cuda"] if has_gpu() else ["cpu"]
ROWS, COLUMNS = 6, 90
JUNK = -7
needs_compiler = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")


class Cut(NamedTuple):
    """Row, tokens and context of each range."""

    rows: list[int]
    counts: list[int]
    contexts: list[int]

    def places(self) -> list[tuple[int, int]]:
        """Row and position of each token."""
        return [(row, place) for row, count, context in zip(*self, strict=True) for place in range(context - count, context)]

    def ranges(self, device: str) -> Ranges:
        starts = torch.tensor([0, *self.counts]).cumsum(0)
        return Ranges(*(torch.as_tensor(x, dtype=torch.int32, device=device) for x in (self.rows, starts, self.contexts)))


@st.composite
def cuts(draw: Any) -> Cut:
    """Decode steps, prompts, chunks, and empty ranges; a sequence may come twice."""
    contexts = draw(st.lists(st.integers(0, COLUMNS), min_size=1, max_size=7))
    counts = [draw(st.one_of(st.integers(0, context), st.just(min(context, 1)))) for context in contexts]
    return Cut([draw(st.integers(0, ROWS - 1)) for _ in contexts], counts, contexts)


def table(device: str, columns: int = COLUMNS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    return torch.randint(0, 2**30, (ROWS, columns), generator=generator, dtype=torch.int32).to(device)


def part_of_wider(rows: int, columns: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A table's memory, and ``[rows, columns]`` of it."""
    wide = torch.full((rows + 1, columns + 3), JUNK, dtype=torch.int32, device=device)
    return wide, wide[:rows, :columns]


def results(tokens: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for more tokens, and its part for these."""
    more = torch.full((tokens + 2,), JUNK, device=device)
    return more, more[:tokens]


@contextmanager
def nobody_waits(device: str) -> Iterator[None]:
    """On a GPU whatever waits for it raises."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@given(cut=cuts())
def test_each_token_has_its_sequences_number_at_its_position(device: str, cut: Cut) -> None:
    kept, ranges = table(device), cut.ranges(device)
    (more, values), (_, rows), (_, positions) = (results(sum(cut.counts), device) for _ in range(3))
    with nobody_waits(device):
        gather_tokens_reference(kept, ranges, values, Places(rows, positions))
    assert list(zip(rows.tolist(), positions.tolist(), strict=True)) == cut.places()
    assert values.tolist() == [int(kept[place]) for place in cut.places()]
    assert more[len(values):].tolist() == [JUNK] * 2


@pytest.mark.parametrize("device", DEVICES)
@given(cut=cuts(), block_tokens=st.sampled_from([1, 3, 5, 16, 32]), wider=st.integers(0, 2))
def test_each_range_has_the_blocks_of_its_context_and_each_token_its_slot(device: str, cut: Cut, block_tokens: int, wider: int) -> None:
    kept, ranges = table(device, 95), cut.ranges(device)
    columns = -(-max(cut.contexts) // block_tokens) + wider
    more, slots = results(sum(cut.counts), device)
    wide, blocks = part_of_wider(len(cut.rows), columns, device)
    places = Places(*torch.tensor(cut.places(), device=device).view(-1, 2).long().unbind(1))
    with nobody_waits(device):
        gather_blocks_reference(kept, ranges, places, block_tokens, blocks, slots)
    expected = torch.zeros_like(blocks)
    for r, (row, context) in enumerate(zip(cut.rows, cut.contexts, strict=True)):
        needed = -(-context // block_tokens)
        expected[r, :needed] = kept[row, :needed]
    assert torch.equal(blocks, expected)
    assert wide[:, columns:].eq(JUNK).all()
    assert wide[-1].eq(JUNK).all()
    assert slots.tolist() == [int(kept[row, place // block_tokens]) * block_tokens + place % block_tokens for row, place in cut.places()]
    assert more[len(slots):].tolist() == [JUNK] * 2


@needs_compiler
@settings(max_examples=300)
@given(cut=cuts(), block_tokens=st.sampled_from([1, 3, 5, 16, 32]), wider=st.integers(0, 2))
def test_the_kernels_gather_the_same(cut: Cut, block_tokens: int, wider: int) -> None:
    tokens, columns, ranges = sum(cut.counts), -(-max(cut.contexts) // block_tokens) + wider, cut.ranges("cpu")
    ours, theirs = ([*(results(tokens, "cpu") for _ in range(4)), part_of_wider(len(cut.rows), columns, "cpu")] for _ in range(2))
    (_, values), *places, (_, slots), (_, blocks) = ours
    gather_tokens(table("cpu"), ranges, values, of_each := Places(*(own for _, own in places)))
    gather_blocks(table("cpu", 95), ranges, of_each, block_tokens, blocks, slots)
    (_, values), *places, (_, slots), (_, blocks) = theirs
    gather_tokens_reference(table("cpu"), ranges, values, of_each := Places(*(own for _, own in places)))
    gather_blocks_reference(table("cpu", 95), ranges, of_each, block_tokens, blocks, slots)
    for (whole, _), (expected, _) in zip(ours, theirs, strict=True):
        assert torch.equal(whole, expected)


@needs_compiler
@pytest.mark.parametrize("call", [lambda kept, ranges, places, out: gather_tokens(kept, ranges, out, places),
                                  lambda kept, ranges, places, out: gather_blocks(kept, ranges, places, 16, kept.clone(), out)])
def test_gathering_is_no_part_of_a_recorded_step(call: Any) -> None:
    with recorded(Plan(1)), pytest.raises(NotRecordableError, match="kvloom_gather"):
        call(table("cpu"), Cut([0], [1], [1]).ranges("cpu"), Places(*torch.zeros(2, 1).long()), torch.zeros(1).long())


def test_without_kernels_the_references_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "problem", lambda: "no compiler")
    monkeypatch.setattr(gather, "unrecorded", lambda name: pytest.fail(f"{name} was called"))
    values, rows, positions, slots = torch.zeros(4, 2, dtype=torch.int64)
    places = Places(rows, positions)
    cut, blocks = Cut([4], [2], [20]), torch.zeros(1, 2, dtype=torch.int32)
    gather_tokens(table("cpu"), cut.ranges("cpu"), values, places)
    gather_blocks(table("cpu"), cut.ranges("cpu"), places, 16, blocks, slots)
    assert positions.tolist() == [18, 19]
    assert values.tolist() == table("cpu")[4, 18:20].tolist()
    assert blocks.tolist() == table("cpu")[4:5, :2].tolist()
