"""Norms, gated activations, rotation and cache writing against their plain-torch references, over odd shapes."""

from __future__ import annotations

import pytest
import torch

from kvloom.interfaces.model_config import RopeParameters
from kvloom.layers.rope_scaling import rope_frequencies
from kvloom.layers.rotary import Rotation, rotate
from kvloom_kernels.activation import Finish, gated_mul, gated_mul_reference, silu_mul, silu_mul_reference
from kvloom_kernels.attention import cache_shapes, norm_rope_write, side_elements
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
@pytest.mark.parametrize("finish", [Finish.SILU, Finish.GELU, Finish.GELU_TANH])
def test_gated_activation(shape: tuple[int, int], dtype: torch.dtype, tolerance: float, finish: Finish) -> None:
    x = random(shape[0], 2 * shape[1], dtype=dtype) * (10 if finish is Finish.SILU else 1)
    found = gated_mul(x, finish)
    torch.testing.assert_close(found, gated_mul_reference(x, finish), atol=5 * tolerance, rtol=tolerance)
    assert torch.equal(found, torch.cat([gated_mul(row[None], finish) for row in x])), "a row's bits depend on other rows"


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
    rotation = Rotation(table, positions, dtype)
    expected_q, expected_k = (rotate(x if n is None else rms_norm_reference(x, n, 1e-6), rotation) for x, n in zip((q, k), norms, strict=True))
    side = side_elements(dtype)
    shapes = cache_shapes(kv_heads, dim, value_dim, block_tokens, dtype)
    caches = [torch.zeros(blocks_there, *shape, dtype=dtype) for shape in shapes]
    kept_v = v.clone()
    norm_rope_write(q, k, v, *caches, slots, block_tokens, (table, positions), norms if normed else None, 1e-6)
    k_cache = caches[0].transpose(2, 3).reshape(blocks_there, kv_heads, block_tokens, -1)[..., :dim]  # [N, Hk, B, D]
    v_cache = caches[1].transpose(3, 4).reshape(blocks_there, kv_heads, -1, value_dim)[:, :, :block_tokens]
    assert shapes[1] == (kv_heads, -(-block_tokens // side), value_dim, side)
    torch.testing.assert_close(q, expected_q, atol=tolerance, rtol=tolerance)
    blocks, offsets = slots // block_tokens, slots % block_tokens
    torch.testing.assert_close(k_cache[blocks, :, offsets], expected_k, atol=tolerance, rtol=tolerance)
    assert torch.equal(v_cache[blocks, :, offsets], kept_v)
    assert int((v_cache != 0).any(-1).any(1).sum()) == tokens, "nothing else was written"
