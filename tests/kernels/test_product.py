"""Products over packed weights, lookups in them, plans of kernel calls, and the memory of their results."""

from __future__ import annotations

import ctypes
import gc
import mmap
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom_kernels import norm, scratch
from kvloom_kernels import plan as plan_of_kernels
from kvloom_kernels.activation import Finish
from kvloom_kernels.linear import WeightShape, can_pack, lookup, pack, product, product_kind, product_reference, unpack
from kvloom_kernels.native import problem
from kvloom_kernels.norm import rms_norm, rms_norm_add
from kvloom_kernels.plan import NotRecordableError, Plan, recorded
from kvloom_kernels.scratch import Arena, scratch_from

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")
DTYPES = [torch.float32, torch.bfloat16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 1e-4}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-5}}
ROWS = [1, 2, 3, 4, 5, 6, 7, 12, 13, 25, 64, 100]
SHAPES = [(1, 1), (2, 3), (31, 34), (32, 64), (33, 61), (100, 576), (200, 129)]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@EACH_DTYPE
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_products(dtype: torch.dtype, rows: int, out_features: int, in_features: int, biased: bool) -> None:
    x, weight = random(rows, in_features, dtype=dtype), random(out_features, in_features, dtype=dtype, seed=1)
    bias = random(out_features, dtype=dtype, seed=2) if biased else None
    shape = WeightShape(out_features, in_features)
    got = product(x, pack(weight.clone()), shape, bias)
    assert got.dtype is dtype
    torch.testing.assert_close(got, product_reference(x, weight, bias), **TOLERANCE[dtype])


@EACH_DTYPE
@pytest.mark.parametrize("finish", Finish)
@pytest.mark.parametrize("rows", [1, 5, 13, 40])
@pytest.mark.parametrize(("half", "in_features"), [(1, 2), (7, 9), (16, 32), (17, 33), (100, 64)])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_products(dtype: torch.dtype, finish: Finish, rows: int, half: int, in_features: int, biased: bool) -> None:
    x, weight = random(rows, in_features, dtype=dtype), random(2 * half, in_features, dtype=dtype, seed=1)
    bias = random(2 * half, dtype=dtype, seed=2) if biased else None
    shape = WeightShape(2 * half, in_features)
    got = product(x, pack(weight.clone()), shape, bias, finish)
    expected = product_reference(x, weight, bias, finish)
    assert got.shape == expected.shape == (rows, half if finish else 2 * half)
    # The gate is rounded before it is activated, which its neighbour in bfloat16 may be too.
    torch.testing.assert_close(got, expected, **({"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2**-5, "atol": 2**-3}))


@pytest.mark.parametrize("rows", [1, 30])
def test_widened_results_are_not_rounded(rows: int) -> None:
    x, weight, shape = random(rows, 96, dtype=torch.bfloat16), random(50, 96, dtype=torch.bfloat16, seed=1), WeightShape(50, 96)
    got = product(x, pack(weight.clone()), shape, widened=True)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, product_reference(x, weight, widened=True), rtol=1e-5, atol=1e-4)
    assert torch.equal(got.bfloat16(), product(x, pack(weight.clone()), shape))


@EACH_DTYPE
@given(rows=st.integers(1, 40), out=st.integers(1, 90), inner=st.integers(1, 90), gated=st.booleans(), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_what_is_packed_comes_out_again_and_a_row_does_not_depend_on_others(dtype, rows: int, out: int, inner: int, gated: bool, seed: int) -> None:
    out += out % 2 if gated else 0
    weight, shape = random(out, inner, dtype=dtype, seed=seed), WeightShape(out, inner)
    packed = pack(weight.clone())
    assert torch.equal(unpack(packed, shape), weight)
    x = random(rows, inner, dtype=dtype, seed=seed + 1)
    whole = product(x, packed, shape, None, Finish.SILU if gated else Finish.PLAIN)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(product(x[row:row + 1], packed, shape, None, Finish.SILU if gated else Finish.PLAIN)[0], whole[row])


@EACH_DTYPE
def test_rows_may_lie_apart_and_threads_change_nothing(dtype: torch.dtype) -> None:
    wide, weight, shape = random(23, 160, dtype=dtype), random(70, 48, dtype=dtype, seed=1), WeightShape(70, 48)
    packed = pack(weight.clone())
    expected = product(wide[:, 16:64].contiguous(), packed, shape)
    assert torch.equal(product(wide[:, 16:64], packed, shape), expected)
    assert torch.equal(product(wide[:, 16:112:2], packed, shape), product(wide[:, 16:112:2].contiguous(), packed, shape))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(product(wide[:, 16:64], packed, shape), expected)
    finally:
        torch.set_num_threads(before)


@EACH_DTYPE
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_stay_in_their_row(dtype: torch.dtype, value: float) -> None:
    x, weight, shape = random(9, 32, dtype=dtype), random(40, 32, dtype=dtype, seed=1), WeightShape(40, 32)
    x[4, 7] = value
    got = product(x, pack(weight.clone()), shape)
    assert not torch.isfinite(got[4]).any()
    assert torch.isfinite(got[[0, 1, 2, 3, 5, 6, 7, 8]]).all()


@EACH_DTYPE
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (33, 7), (100, 64)])
def test_lookups(dtype: torch.dtype, rows: int, width: int) -> None:
    table, shape = random(rows, width, dtype=dtype), WeightShape(rows, width)
    ids = torch.randint(0, rows, (19,))
    assert torch.equal(lookup(ids, table), table[ids])
    assert torch.equal(lookup(ids, pack(table.clone()), shape), table[ids])


def test_other_dtypes_are_not_packed() -> None:
    assert can_pack(torch.zeros(2, 2))
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float16))
    assert torch.equal(lookup(torch.tensor([1]), torch.ones(2, 3, dtype=torch.float16)), torch.ones(1, 3, dtype=torch.float16))


def test_the_kind_of_products_is_one_that_is_known() -> None:
    assert product_kind() in ("tiles", "native", "widened")


def test_a_plan_computes_again_from_what_its_inputs_hold_then() -> None:
    weight, shape = random(48, 32, dtype=torch.float32), WeightShape(48, 32)
    packed, gain = pack(weight.clone()), random(32, dtype=torch.float32, seed=3)
    x, residual = random(5, 32, dtype=torch.float32, seed=1), random(5, 32, dtype=torch.float32, seed=2)

    def step() -> torch.Tensor:
        normed, _ = rms_norm_add(x, residual, gain, 1e-5)
        return product(rms_norm(normed, gain, 1e-5), packed, shape)

    plan, arena = Plan(5), Arena(2**16)
    with recorded(plan), scratch_from(arena):
        out = step()
    plan.keep(arena, out)
    assert len(plan) == 3
    assert torch.equal(out, step())
    for seed in (7, 8):
        x.copy_(random(5, 32, dtype=torch.float32, seed=seed))
        plan.replay()
        assert torch.equal(out, step())


def test_a_plan_of_ranges_computes_as_many_rows_as_there_are_and_all_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    gain, rows, ranges = torch.ones(16), random(8, 16, dtype=torch.float32), random(3, 16, dtype=torch.float32, seed=1)
    plan, arena = Plan(8, ranges=3, computed_rows=5), Arena(2**16)
    with recorded(plan), scratch_from(arena):
        of_rows = rms_norm(rows, gain, 1e-5)
        with pytest.raises(NotRecordableError, match="works on 3 rows of a step of 8"):
            rms_norm(ranges, gain, 1e-5)
        monkeypatch.setattr(norm, "run", partial(plan_of_kernels.run, on_ranges=True))
        of_ranges = rms_norm(ranges, gain, 1e-5)
        with pytest.raises(NotRecordableError, match="works on 2 ranges of a step of 3"):
            rms_norm(ranges[:2], gain, 1e-5)
    plan.keep(arena)
    assert torch.equal(of_rows[:5], rms_norm(rows[:5], gain, 1e-5))
    assert torch.equal(of_ranges, rms_norm(ranges, gain, 1e-5))
    of_rows.zero_(), of_ranges.zero_()
    rows.mul_(-1), ranges.mul_(-1)
    plan.replay(2)
    assert torch.equal(of_rows, torch.cat((rms_norm(rows[:2], gain, 1e-5), torch.zeros(6, 16))))
    assert torch.equal(of_ranges, rms_norm(ranges, gain, 1e-5))


def test_calls_outside_of_a_recording_are_not_in_the_plan() -> None:
    plan, x, gain = Plan(2), torch.ones(2, 16), torch.ones(16)
    with recorded(plan):
        rms_norm(x, gain, 1e-5)
    rms_norm(x, gain, 1e-5)
    assert len(plan) == 1


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_an_arena_hands_out_room_that_nobody_has_and_takes_it_back(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(4096)
    whole = arena.free_bytes
    held: list[torch.Tensor] = []
    for is_new, size in steps:
        if not is_new and held:
            del held[size % len(held)]
            continue
        made = arena.empty((size,), torch.int32)
        if made is not None:
            made.fill_(len(held))
            held.append(made)
            assert made.data_ptr() % scratch.ALIGNMENT_BYTES == 0
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in held)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    held.clear()
    made = None
    gc.collect()
    assert arena.free_bytes == whole
    assert arena.empty((whole // 4 - 16,), torch.int32) is not None, "in one piece"


def test_a_view_keeps_its_room() -> None:
    arena = Arena(1024)
    view = arena.empty((4, 8), torch.float32)[1:, :2]
    view.fill_(3.0)
    before = arena.free_bytes
    other = arena.empty((8,), torch.float32)
    other.fill_(0.0)
    assert (view == 3.0).all()
    del view
    assert arena.free_bytes > before - 64


def test_without_room_results_lie_elsewhere() -> None:
    arena = Arena(256)
    with scratch_from(arena):
        small, large = scratch.empty((4,), torch.float32), scratch.empty((1000,), torch.float32)
    assert large.shape == (1000,)
    assert arena.free_bytes < 256
    del small


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mincore"), reason="this system does not say which pages are there")
def test_the_first_half_of_an_arena_is_there_once_it_was_touched() -> None:
    arena, pages = Arena(64 * 2**20), 64 * 2**20 // mmap.PAGESIZE
    first = -(-arena._memory.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE

    def resident() -> list[int]:
        found = (ctypes.c_ubyte * (pages - 1))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t((pages - 1) * mmap.PAGESIZE), found) == 0
        return [page & 1 for page in found]

    assert sum(resident()[:pages // 2]) < pages // 8, "else there is nothing to be seen"
    arena.touch()
    assert all(resident()[:pages // 2 - 1])
    assert sum(resident()[pages // 2:]) < pages // 8  # a huge page may be half of it


def test_what_does_not_fit_is_refused_before_memory_is_read() -> None:
    shape, x = WeightShape(8, 4), torch.zeros(2, 4)
    packed = pack(torch.zeros(8, 4))
    for wrong in ((torch.zeros(2, 5), packed), (x.bfloat16(), packed), (x, packed[:0])):
        with pytest.raises(ValueError, match="cannot be multiplied"):
            product(*wrong, shape)
