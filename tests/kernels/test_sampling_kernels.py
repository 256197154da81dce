"""Choosing without sorting gives what sorting gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom_kernels.native import problem
from kvloom_kernels.sampling import (
    LIST_LIMIT,
    best,
    draw,
    draw_reference,
    token_logprobs,
    token_logprobs_reference,
    token_logprobs_torch,
    top_p,
    top_p_reference,
)

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")
LOGITS = st.lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0, -torch.inf]), st.floats(-40, 40, width=32)), min_size=1, max_size=70)


@given(row=LOGITS, p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999]))
def test_top_p_keeps_what_sorting_keeps(row: list, p: float) -> None:
    logits = torch.tensor([row])
    if not torch.isfinite(logits).any():
        return
    got, expected = top_p(logits.clone(), torch.tensor([p]))[0], top_p_reference(logits.clone(), torch.tensor([p]))[0]
    mass = logits.double().softmax(-1)[0]
    if torch.equal(got, expected):
        return
    kept = torch.isfinite(got)  # rounding may decide at the border: then both sets reach p within it
    assert mass[kept].sum() >= p - 1e-5
    assert mass[kept].sum() - mass[kept].min() <= p + 1e-5


@pytest.mark.parametrize("size", [1, 15, 16, 17, 255, 256, 257, 50_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
def test_draws_are_those_of_the_cumulative_distribution(size: int, spread: float) -> None:
    logits = torch.randn(20, size, generator=torch.Generator().manual_seed(0)) * spread
    if size > 3:
        logits[:, ::3] = -torch.inf
    best = logits.amax(-1)
    uniform = torch.linspace(1e-9, 1 - 1e-9, 20, dtype=torch.float64)
    got, expected = draw(logits, best, uniform), draw_reference(logits, best, uniform)
    assert torch.isfinite(logits.gather(1, got[:, None])).all()
    cumulative = (logits - best[:, None]).double().exp().cumsum(-1)
    at = cumulative / cumulative[:, -1:]
    # The same token, or one whose border the number meets within float32's rounding.
    near = (at.gather(1, got[:, None])[:, 0] - at.gather(1, expected[:, None])[:, 0]).abs() < 1e-5
    assert near.all()


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
def test_a_row_without_any_weight_breaks_nothing(value: float) -> None:
    logits = torch.stack((torch.full((40,), value), torch.arange(40.0)))
    kept = torch.isfinite(top_p(logits, torch.tensor([0.9, 0.9])))
    assert kept.sum(-1).tolist() == [0, 3]


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 40, 300])
@pytest.mark.parametrize("function", [top_p, top_p_reference])
def test_top_p_hides_no_nan(function, size: int) -> None:
    clean = torch.randn(size, generator=torch.Generator().manual_seed(size))
    logits = clean.repeat(2 * size, 1)
    places = torch.arange(2 * size) % size
    logits[torch.arange(2 * size), places] = torch.tensor([torch.nan, -torch.nan]).repeat_interleave(size)
    before = logits.clone()
    function(logits, torch.full((2 * size,), 0.5))
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    assert torch.isnan(logits.max(-1).values).all()  # what the sampler looks at


@pytest.mark.parametrize("uniform", [1e-300, 0.5, 1 - 2**-53])
def test_a_token_without_weight_is_never_drawn(uniform: float) -> None:
    logits = torch.full((1, 600), -torch.inf)
    logits[0, [300, 310]] = 0.0
    token = int(draw(logits, torch.zeros(1), torch.tensor([uniform], dtype=torch.float64)))
    assert token == (300 if uniform < 0.5 else 310)


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_same_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> None:
    before = logits.clone()
    expected = token_logprobs_reference(logits, token_ids, k)
    # The second is that of GPUs; torch sums up in float32, on a CPU without AVX-512 in few lanes.
    for got, tolerance in ((token_logprobs(logits, token_ids, k), 1e-5), (token_logprobs_torch(logits, token_ids, k), 3e-5)):
        assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.shape == theirs.shape == (len(logits), 1 + k)
            assert mine.dtype is theirs.dtype
        sound = torch.isfinite(logits.float().amax(-1))  # not so with NaN, infinity, or nothing but minus infinity
        torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-6, atol=tolerance, equal_nan=True)
        assert torch.isnan(got.logprobs[~sound]).all()
        assert torch.equal(got.token_ids[sound], expected.token_ids[sound])
        assert torch.equal(got.ranks[sound], expected.ranks[sound])
        assert torch.equal(got.ranks[:, 1:], expected.ranks[:, 1:])
        for chosen, row in zip(token_ids.tolist(), got.token_ids.tolist(), strict=True):
            assert row[0] == chosen
            assert len(set(row[1:])) == k
            assert all(0 <= token < logits.shape[1] for token in row)


@given(
    rows=st.integers(1, 4), size=st.one_of(st.integers(1, 40), st.integers(1, 700)), k=st.sampled_from([0, 1, 5, 20, 100, 256, 257, 700]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), values=st.sampled_from(["spread", "few", "rising", "falling", "equal"]),
    odd=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 699), st.sampled_from([-torch.inf, -torch.inf, torch.inf, torch.nan, 1e4])), max_size=4),
    masked=st.floats(0, 1), seed=st.integers(0, 2**31),
)
def test_logprobs_are_those_of_sorting(rows: int, size: int, k: int, dtype: torch.dtype, values: str, odd: list, masked: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = {
        "spread": torch.randn(rows, size, generator=random) * 10, "few": torch.randint(-2, 3, (rows, size), generator=random) * 1.0,
        "rising": torch.linspace(-5, 5, size).repeat(rows, 1), "falling": torch.linspace(5, -5, size).repeat(rows, 1),
        "equal": torch.zeros(rows, size),
    }[values]
    if masked > 0.5:
        logits[torch.rand(rows, size, generator=random) < 2 * masked - 1] = -torch.inf
    for row, column, value in odd:
        logits[row % rows, column % size] = value
    token_ids = torch.randint(0, size, (rows,), generator=random)
    assert_same_logprobs(logits.to(dtype), token_ids, min(k, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "size"), [(0, 49_152), (1, 50_257), (5, 50_257), (20, 49_152), (LIST_LIMIT, 50_257), (LIST_LIMIT + 1, 49_152)])
def test_logprobs_over_a_long_vocabulary(dtype: torch.dtype, k: int, size: int, threads: int) -> None:
    logits = (torch.randn(5, size, generator=torch.Generator().manual_seed(k)) * 4).to(dtype)
    logits[1] = logits[1].sort().values
    logits[2, 7:] = -torch.inf
    logits[3, size // 2] = torch.nan
    assert_same_logprobs(logits, torch.tensor([0, size - 1, 5, 1, int(logits[4].argmax())]), k)


def test_logprobs_of_a_whole_vocabulary() -> None:
    logits = torch.randn(2, 3001).bfloat16()
    assert_same_logprobs(logits, torch.tensor([0, 3000]), 3001)
    assert token_logprobs(logits, torch.tensor([0, 3000]), 3001).logprobs[:, 1:].exp().sum(-1).tolist() == pytest.approx([1, 1])


def test_logprobs_of_large_logits_are_of_their_differences() -> None:
    assert_same_logprobs(torch.tensor([[1e4, 1e4, -3.0]]), torch.tensor([0]), 2)


def test_ties_go_to_the_lower_token_and_share_the_chosen_rank() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0, 2.0, 2.0]])
    for token, rank in ((4, 1), (1, 1), (0, 4), (2, 5)):
        got = token_logprobs(logits, torch.tensor([token]), 4)
        assert got.token_ids.tolist() == [[token, 1, 3, 4, 0]]
        assert got.ranks.tolist() == [[rank, 1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_need_not_touch_each_other(dtype: torch.dtype) -> None:
    wide = torch.randn(3, 100).to(dtype)
    for logits in (wide[:, :70], wide[::2], wide[:1].expand(3, -1), wide.T, wide[:0]):
        assert_same_logprobs(logits, torch.arange(len(logits)) % logits.shape[1], 3)


@pytest.mark.parametrize("function", [token_logprobs, token_logprobs_reference])
def test_what_would_read_out_of_bounds_is_refused(function) -> None:
    logits, ids = torch.zeros(2, 10), torch.tensor([0, 9])
    for token_ids, k, words in (
        (ids, 11, "k must be in 0 to 10"), (ids, -1, "k must be in 0 to 10"), (torch.tensor([0, 10]), 1, r"in \[0, 10\)"),
        (torch.tensor([0, -1]), 1, r"in \[0, 10\)"), (ids[:1], 1, "are needed"), (ids.int(), 1, "are needed"), (ids[:, None], 1, "are needed"),
    ):
        with pytest.raises(ValueError, match=words):
            function(logits, token_ids, k)
    with pytest.raises(ValueError, match="are needed"):
        function(logits[0], ids, 1)


@given(row=LOGITS, repeats=st.integers(1, 3))
def test_the_best_is_the_first_of_the_largest(row: list, repeats: int) -> None:
    logits = torch.tensor([row * repeats, row[::-1] * repeats])
    value, index = best(logits)
    expected = logits.max(dim=-1).values
    assert torch.equal(value, expected)
    assert index.tolist() == [(logits[i] == expected[i]).nonzero()[0].item() for i in range(2)]


@pytest.mark.parametrize("place", [0, 17, 299])
def test_a_row_with_nan_has_no_best(place: int) -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    logits[1, place] = torch.nan
    value, index = best(logits)
    assert torch.isfinite(value).tolist() == [True, False]
    assert 0 <= int(index[1]) < 300


@pytest.mark.parametrize("kind", ["equal", "two values", "steps"])
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.95, 1 - 1e-6])
def test_top_p_over_long_rows_of_few_values(kind: str, p: float) -> None:
    size = 50_000
    row = {"equal": torch.zeros(size), "two values": torch.arange(size) % 2 * 1.0, "steps": (torch.arange(size) % 50) * -0.5}[kind]
    kept = torch.isfinite(top_p(row[None].clone(), torch.tensor([p]))[0])
    expected = torch.isfinite(top_p_reference(row[None].clone(), torch.tensor([p]))[0])
    assert torch.equal(kept, expected)
