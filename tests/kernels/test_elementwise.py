"""Norms, gated activations, rotation and cache writing against their plain-torch references, over odd shapes."""

from __future__ import annotations

import pytest
import torch

from kvloom.interfaces.model_config import RopeParameters
from kvloom.layers.rope_scaling import rope_frequencies
from kvloom.layers.rotary import Rotation, rotate
from kvloom_kernels.activation import silu_mul, silu_mul_reference
from kvloom_kernels.attention import norm_rope_write
from kvloom_kernels.linear import linear, linear_reference, product_kind
from kvloom_kernels.native import problem
from kvloom_kernels.norm import rms_norm, rms_norm_add, rms_norm_reference

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")
SHAPES = [(1, 1), (1, 16), (3, 17), (7, 64), (33, 100), (5, 576)]
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    x, residual, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(shape[1], dtype=dtype, seed=2)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), atol=tolerance, rtol=tolerance)
    out, stream = rms_norm_add(x, residual, weight, 1e-5)
    assert torch.equal(stream, residual + x)
    torch.testing.assert_close(out, rms_norm_reference(residual + x, weight, 1e-5), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_activation(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    x = random(shape[0], 2 * shape[1], dtype=dtype) * 10
    torch.testing.assert_close(silu_mul(x), silu_mul_reference(x), atol=tolerance, rtol=tolerance)


def test_gated_activation_of_extreme_and_broken_numbers() -> None:
    gate = torch.tensor([[1e30, -1e30, float("inf"), float("nan"), 0.0, -90.0, 90.0]])
    x = torch.cat((gate, torch.ones_like(gate)), dim=1)
    torch.testing.assert_close(silu_mul(x), silu_mul_reference(x), equal_nan=True, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize(("dim", "rotary_dim", "block_tokens"), [(8, 8, 16), (64, 64, 16), (20, 12, 5), (6, 2, 1)])
@pytest.mark.parametrize("normed", [False, True])
def test_norm_rotation_and_writing(dtype: torch.dtype, tolerance: float, dim: int, rotary_dim: int, block_tokens: int, normed: bool) -> None:
    tokens, heads, kv_heads, value_dim, blocks_there = 9, 3, 2, dim + 4, 12
    fused = random(tokens, heads * dim + kv_heads * dim + kv_heads * value_dim, dtype=dtype)
    q, k, v = (part.unflatten(1, (-1, width)) for part, width in zip(
        fused.split([heads * dim, kv_heads * dim, kv_heads * value_dim], dim=1), (dim, dim, value_dim), strict=True))
    frequencies, _ = rope_frequencies(RopeParameters(), rotary_dim, 64, 64)
    angles = torch.arange(64.0)[:, None] * frequencies
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions, slots = torch.randperm(64)[:tokens], torch.randperm(blocks_there * block_tokens)[:tokens].sort().values
    norms = (random(dim, dtype=dtype, seed=3), random(dim, dtype=dtype, seed=4)) if normed else (None, None)
    cos, sin = table[positions].to(dtype)[:, None].chunk(2, dim=-1)
    rotation = Rotation(table, positions, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    expected_q, expected_k = (rotate(x if n is None else rms_norm_reference(x, n, 1e-6), rotation) for x, n in zip((q, k), norms, strict=True))
    k_cache = torch.zeros(blocks_there, kv_heads, dim, block_tokens, dtype=dtype)
    v_cache = torch.zeros(blocks_there, kv_heads, block_tokens, value_dim, dtype=dtype)
    kept_v = v.clone()
    norm_rope_write(q, k, v, k_cache, v_cache, slots, table, positions, *norms, 1e-6)
    torch.testing.assert_close(q, expected_q, atol=tolerance, rtol=tolerance)
    blocks, offsets = slots // block_tokens, slots % block_tokens
    torch.testing.assert_close(k_cache[blocks, :, :, offsets], expected_k, atol=tolerance, rtol=tolerance)
    assert torch.equal(v_cache[blocks, :, offsets], kept_v)
    assert int((v_cache != 0).any(-1).any(1).sum()) == tokens, "nothing else was written"


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 12, 13, 25, 64, 100])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 2), (31, 34), (32, 64), (33, 62), (100, 576), (200, 128)])
@pytest.mark.parametrize("biased", [False, True])
def test_bfloat16_product(rows: int, out_features: int, in_features: int, biased: bool) -> None:
    if product_kind() != "native":
        pytest.skip("this CPU has no bfloat16 products of its own, so torch's are used")
    x, weight = random(rows, in_features, dtype=torch.bfloat16), random(out_features, in_features, dtype=torch.bfloat16, seed=1)
    bias = random(out_features, dtype=torch.bfloat16, seed=2) if biased else None
    expected = linear_reference(x.double(), weight.double(), None if bias is None else bias.double())
    # One rounding to 8 bits, after a sum in float32.
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("kind", ["widened", "torch"])
@pytest.mark.parametrize("rows", [1, 40])
def test_bfloat16_products_without_our_kernel(monkeypatch: pytest.MonkeyPatch, kind: str, rows: int) -> None:
    monkeypatch.setattr("kvloom_kernels.linear.product_kind", lambda: kind)
    x, weight, bias = random(rows, 64, dtype=torch.bfloat16), random(24, 64, dtype=torch.bfloat16, seed=1), random(24, dtype=torch.bfloat16)
    expected = linear_reference(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(linear(x, weight, bias).double(), expected, rtol=2**-7, atol=0.1)


@pytest.mark.parametrize("rows", [3, 40])
def test_products_of_other_shapes_and_dtypes_are_torchs(rows: int) -> None:
    x, weight = random(rows, 33), random(8, 33, seed=1)
    assert torch.equal(linear(x, weight), linear_reference(x, weight))
    odd = linear(x.bfloat16(), weight.bfloat16())  # 33 elements do not pair up
    torch.testing.assert_close(odd.float(), linear_reference(x.bfloat16().float(), weight.bfloat16().float()), rtol=2**-7, atol=1e-2)
    strided = random(rows, 64, dtype=torch.bfloat16)[:, ::2]
    torch.testing.assert_close(linear(strided, weight.bfloat16()[:, :32].contiguous()).float(),
                               linear_reference(strided.float(), weight.bfloat16()[:, :32].float()), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_product_with_broken_numbers_shows_them(value: float) -> None:
    x, weight = random(9, 32, dtype=torch.bfloat16), random(40, 32, dtype=torch.bfloat16, seed=1)
    x[4, 7] = value
    assert not torch.isfinite(linear(x, weight)[4]).any()
    assert torch.isfinite(linear(x, weight)[[0, 1, 2, 3, 5, 6, 7, 8]]).all()
