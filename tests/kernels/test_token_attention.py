"""Attention over a step's own tokens: every backend against torch's own attention, range by range."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from kvloom.errors import InternalError
from kvloom.interfaces import AttentionBackend, AttentionBatch, AttentionSpec
from kvloom_kernels.native import problem
from kvloom_plugins.attention.cpu import CpuAttention
from kvloom_plugins.attention.reference import ReferenceAttention
from kvloom_plugins.attention.torch_batched import TorchAttention

BACKENDS = [ReferenceAttention, TorchAttention, CpuAttention]
needs_compiler = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")
EACH_BACKEND = pytest.mark.parametrize("backend", [pytest.param(b, marks=needs_compiler if b is CpuAttention else ()) for b in BACKENDS])
SPEC = AttentionSpec(num_heads=6, num_kv_heads=6, head_dim=20, value_dim=20, scale=0.3, causal=False, stored=False)


def run(backend: type[AttentionBackend], spec: AttentionSpec, rows: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the backend gives, what torch gives in double precision), ``[T, Hq, Dv]`` float32 each."""
    generator = torch.Generator().manual_seed(seed)
    heads, sizes = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), (spec.head_dim, spec.head_dim, spec.value_dim)
    fused = torch.randn(sum(rows), sum(h * d for h, d in zip(heads, sizes, strict=True)), generator=generator).to(getattr(torch, spec.dtype))
    parts = fused.split([h * d for h, d in zip(heads, sizes, strict=True)], dim=1)
    q, k, v = (part.view(-1, h, d) for part, h, d in zip(parts, heads, sizes, strict=True))  # strided views, as a layer gives them
    starts = np.concatenate(([0], np.cumsum(rows))).astype(np.int32)
    contexts = np.array(rows, np.int32)
    batch = AttentionBatch(
        query_starts=torch.from_numpy(starts), context_tokens=torch.from_numpy(contexts), block_table=torch.zeros(0, 0, dtype=torch.int32),
        slots=torch.zeros(0, dtype=torch.int64), query_starts_host=starts, context_tokens_host=contexts, max_query_tokens=max(rows),
        max_context_tokens=max(rows))
    made = backend(spec)
    out = torch.full((sum(rows), spec.num_heads, spec.value_dim), float("nan"), dtype=fused.dtype)
    got = made.attend_tokens(q, k, v, made.prepare(batch), out)
    assert got.data_ptr() == out.data_ptr()
    expected = [truth(spec, *(x[a:b] for x in (q, k, v))) for a, b in pairwise(starts)]
    return got.float(), torch.cat(expected)


def truth(spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None]
    seen = distance >= 0 if spec.causal else torch.ones_like(distance, dtype=torch.bool)
    if spec.window_tokens is not None:
        seen = seen & (distance.abs() < spec.window_tokens)
    heads = (x.double().transpose(0, 1) for x in (q, k, v))
    return scaled_dot_product_attention(*heads, attn_mask=seen, scale=spec.scale, enable_gqa=True).transpose(0, 1).float()


def assert_close(backend: type[AttentionBackend], spec: AttentionSpec, rows: list[int], tolerance: float = 1e-5, seed: int = 0) -> None:
    got, expected = run(backend, spec, rows, seed)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@EACH_BACKEND
@pytest.mark.parametrize("rows", [[1], [16], [17, 1, 1, 15], [64, 3, 200], [600, 5]], ids=str)
@pytest.mark.parametrize("window", [None, 1, 2, 17, 65])
@pytest.mark.parametrize("causal", [False, True])
def test_each_token_sees_its_own_range_within_the_window(backend: type, rows: list, window: int | None, causal: bool) -> None:
    assert_close(backend, replace(SPEC, window_tokens=window, causal=causal), rows)


@EACH_BACKEND
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim"), [(1, 1, 8, 8), (12, 12, 32, 32), (12, 12, 64, 64), (8, 1, 128, 128),
                                                                    (3, 1, 7, 5), (20, 4, 16, 33)])
def test_head_shapes(backend: type, heads: int, kv_heads: int, dim: int, value_dim: int) -> None:
    assert_close(backend, AttentionSpec(heads, kv_heads, dim, value_dim, dim ** -0.5, causal=False, stored=False), [33, 1, 18])


@EACH_BACKEND
@given(rows=st.lists(st.integers(1, 80), min_size=1, max_size=6), window=st.none() | st.integers(1, 60), group=st.integers(1, 5),
       causal=st.booleans(), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_random_batches(backend: type, rows: list, window: int | None, group: int, causal: bool, seed: int) -> None:
    assert_close(backend, replace(SPEC, num_heads=2 * group, num_kv_heads=2, window_tokens=window, causal=causal), rows, seed=seed)


@EACH_BACKEND
def test_bfloat16_is_as_close_as_its_rounding(backend: type) -> None:
    assert_close(backend, replace(SPEC, dtype="bfloat16", cache_dtype="bfloat16"), [50, 3, 30], tolerance=2e-2)


@EACH_BACKEND
def test_large_scores_do_not_overflow(backend: type) -> None:
    got, expected = run(backend, replace(SPEC, scale=60.0), [40])
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@needs_compiler
@pytest.mark.parametrize("window", [None, 9])
def test_soft_cap_agrees_with_the_reference(window: int | None) -> None:
    spec = replace(SPEC, soft_cap=2.5, window_tokens=window)
    torch.testing.assert_close(run(CpuAttention, spec, [30, 7])[0], run(ReferenceAttention, spec, [30, 7])[0], atol=1e-5, rtol=1e-5)


@needs_compiler
def test_the_number_of_threads_and_the_neighbours_do_not_change_a_result() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(CpuAttention, SPEC, [70])[0]
        torch.set_num_threads(3)
        assert torch.equal(alone, run(CpuAttention, SPEC, [70, 300, 2])[0][:70])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_without_a_cache_are_refused_with_a_reason(backend: type) -> None:
    assert "no sinks" in backend.supports(replace(SPEC, sinks=True))


def test_a_backend_that_takes_what_it_cannot_do_is_named() -> None:
    class Careless(ReferenceAttention):
        attend_tokens = AttentionBackend.attend_tokens

    with pytest.raises(InternalError, match="Careless took .* but has no attend_tokens"):
        run(Careless, SPEC, [3])
