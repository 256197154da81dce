"""Choosing without sorting gives what sorting gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom_kernels.native import problem
from kvloom_kernels.sampling import draw, draw_reference, top_p, top_p_reference

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


@pytest.mark.parametrize("uniform", [1e-300, 0.5, 1 - 2**-53])
def test_a_token_without_weight_is_never_drawn(uniform: float) -> None:
    logits = torch.full((1, 600), -torch.inf)
    logits[0, [300, 310]] = 0.0
    token = int(draw(logits, torch.zeros(1), torch.tensor([uniform], dtype=torch.float64)))
    assert token == (300 if uniform < 0.5 else 310)
