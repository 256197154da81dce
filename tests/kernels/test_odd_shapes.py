"""Products, packing, what lies between products, and sampling against their plain-torch references: sizes around those of vectors,
tiles and panels, and views. Attention has a file of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvloom_kernels.activation import Finish, gated_mul, gated_mul_reference
from kvloom_kernels.attention import kernel_caches, norm_rope_write, norm_rope_write_reference
from kvloom_kernels.bitmask import apply_bitmask, apply_bitmask_reference
from kvloom_kernels.blocks import copy_blocks, copy_blocks_reference, touch, touch_reference
from kvloom_kernels.linear import (
    WeightShape,
    lookup,
    lookup_reference,
    pack,
    pack_reference,
    panel_features,
    product,
    product_reference,
    unpack,
)
from kvloom_kernels.native import problem
from kvloom_kernels.norm import rms_norm, rms_norm_add, rms_norm_reference
from kvloom_kernels.sampling import (
    best,
    best_reference,
    divide,
    divide_reference,
    draw,
    draw_reference,
    token_logprobs,
    token_logprobs_reference,
    top_p,
    top_p_reference,
)

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
ROWS = [1, 2, 15, 16, 17, 33, 64, 65, 200]
FEATURES = [1, 17, 49, 64, 1000]
INNER = [1, 31, 33, 64, 65, 577]
DIMS = [8, 64, 80, 96, 128, 256]
VOCABULARIES = [1, 2, 15, 16, 17, 31, 33, 255, 257, 1000, 5001]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def part_of_wider(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """``[rows, width]`` at a stride, with NaN on both sides."""
    wide = torch.full((rows, width + 9), torch.nan, dtype=dtype)
    wide[:, 3:3 + width] = random(rows, width, dtype=dtype, seed=seed)
    return wide[:, 3:3 + width]


def assert_close(found: torch.Tensor, expected: torch.Tensor, terms: int = 1) -> None:
    """`terms` of size 1 were added up: bfloat16's results are rounded once, sums are float32's."""
    assert found.dtype is expected.dtype
    rounding = 2**-8 if found.dtype is torch.bfloat16 else 2**-22
    torch.testing.assert_close(found, expected, rtol=2 * rounding, atol=2 * rounding + 2**-21 * terms)


@EACH_DTYPE
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("inner", INNER)
def test_products_of_sizes_that_are_no_multiple_of_a_tile(dtype: torch.dtype, features: int, inner: int) -> None:
    weight, bias, shape = random(features, inner, dtype=dtype, seed=1), random(features, dtype=dtype, seed=2), WeightShape(features, inner)
    packed = pack(weight.clone())
    for rows in ROWS:
        x = part_of_wider(rows, inner, dtype)
        assert_close(product(x, packed, shape), product_reference(x, weight), inner)
        assert_close(product(x, packed, shape, bias), product_reference(x, weight, bias), inner)
        assert_close(product(x, packed, shape, widened=True), product_reference(x, weight, widened=True), inner)


@EACH_DTYPE
@pytest.mark.parametrize("half", [1, 17, 48, 500])
@pytest.mark.parametrize("inner", [1, 33, 64, 577])
@pytest.mark.parametrize("finish", [Finish.SILU, Finish.GELU, Finish.GELU_TANH])
def test_gated_products_of_sizes_that_are_no_multiple_of_a_tile(dtype: torch.dtype, half: int, inner: int, finish: Finish) -> None:
    """Gate and factor are rounded to the dtype before they are multiplied, as their neighbours of one rounding may be."""
    weight, bias = random(2 * half, inner, dtype=dtype, seed=1) / inner**0.5, random(2 * half, dtype=dtype, seed=2)
    packed, shape = pack(weight.clone()), WeightShape(2 * half, inner)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2**-5, "atol": 2**-6}
    for rows in ROWS:
        x = part_of_wider(rows, inner, dtype)
        torch.testing.assert_close(product(x, packed, shape, bias, finish), product_reference(x, weight, bias, finish), **tolerance)


@EACH_DTYPE
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("inner", INNER)
def test_packing_and_lookups(dtype: torch.dtype, features: int, inner: int) -> None:
    weight, shape = random(features, inner, dtype=dtype), WeightShape(features, inner)
    for given in (weight.clone(), part_of_wider(features, inner, dtype), weight.T.clone().T):
        packed = pack(given)
        assert torch.equal(packed, pack_reference(weight, panel_features()))
        assert torch.equal(unpack(packed, shape), weight)
    for rows in ROWS:
        ids = torch.randint(0, features, (rows, 2), generator=torch.Generator().manual_seed(rows))[:, 1]
        for table, of in ((weight, None), (packed, shape)):
            assert torch.equal(lookup(ids, table, of), lookup_reference(ids, weight))


@EACH_DTYPE
@pytest.mark.parametrize("width", [1, 8, 31, 33, 64, 80, 1000])
@pytest.mark.parametrize("rows", ROWS)
def test_norms_and_activations(dtype: torch.dtype, width: int, rows: int) -> None:
    x, residual, weight = (random(n, width, dtype=dtype, seed=i) for i, n in enumerate((rows, rows, 1)))
    view = part_of_wider(rows, width, dtype)
    for given in (x, view):
        assert_close(rms_norm(given, weight[0], 1e-5), rms_norm_reference(x, weight[0], 1e-5), 4)
        out, stream = rms_norm_add(given, residual, weight[0], 1e-5)
        assert torch.equal(stream, residual + x)
        assert_close(out, rms_norm_reference(residual + x, weight[0], 1e-5), 4)
    for gate_up in (random(rows, 2 * width, dtype=dtype), part_of_wider(rows, 2 * width, dtype)):
        for finish in (Finish.SILU, Finish.GELU, Finish.GELU_TANH):
            assert_close(gated_mul(gate_up, finish), gated_mul_reference(gate_up, finish), 8)


@EACH_DTYPE
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("normed", [False, True])
def test_norm_rotation_and_cache_writing(dtype: torch.dtype, dim: int, group: int, normed: bool) -> None:
    kv_heads, value_dim = 2, dim if group % 2 else dim // 2 + 3
    for tokens, block_tokens, rotary_dim in ((1, 16, dim), (17, 16, dim), (33, 5, dim // 2), (40, 1, 2), (16, 32, 0)):
        widths = [kv_heads * group * dim, kv_heads * dim, kv_heads * value_dim]
        fused = part_of_wider(tokens, sum(widths), dtype)
        own, plain = ([part.unflatten(1, (-1, d)) for part, d in zip(f.split(widths, dim=1), (dim, dim, value_dim), strict=True)]
                      for f in (fused, fused.clone()))
        angles = torch.rand(64, max(rotary_dim, 2) // 2, generator=torch.Generator().manual_seed(0)) * 6
        table, positions = torch.cat((angles.cos(), angles.sin()), dim=1), torch.arange(tokens) * 7 % 64
        blocks = 3 + tokens // block_tokens
        slots = torch.randperm(blocks * block_tokens, generator=torch.Generator().manual_seed(1))[:tokens]
        caches = [torch.zeros(blocks, kv_heads, block_tokens, d, dtype=dtype) for d in (dim, value_dim)]
        own_caches = kernel_caches(*caches)
        rotation = (table, positions) if rotary_dim else None
        norms = (random(dim, dtype=dtype, seed=3), random(dim, dtype=dtype, seed=4)) if normed else None
        norm_rope_write(*own, *own_caches, slots, block_tokens, rotation, norms, 1e-6)
        norm_rope_write_reference(*plain, *caches, slots, rotation, norms, 1e-6)
        for found, expected in zip((*own, *own_caches), (*plain, *kernel_caches(*caches)), strict=True):
            assert_close(found, expected, 16)
        assert own_caches[0].count_nonzero() > 0


@EACH_DTYPE
@pytest.mark.parametrize("size", VOCABULARIES)
def test_bitmasks_over_views(dtype: torch.dtype, size: int) -> None:
    for count in (1, 3, 17):
        logits, generator = part_of_wider(20, size, dtype), torch.Generator().manual_seed(size)
        masks = torch.randint(-2**31, 2**31, (count, 2 * -(-size // 32)), generator=generator, dtype=torch.int64).int()[:, ::2]
        rows = torch.randperm(20, generator=generator)[:count]
        expected = logits.clone()
        apply_bitmask(logits, masks, rows)
        apply_bitmask_reference(expected, masks, rows)
        assert torch.equal(logits, expected)


@EACH_DTYPE
@pytest.mark.parametrize("width", [1, 7, 64, 1000])
def test_copies_and_first_uses_of_blocks(dtype: torch.dtype, width: int) -> None:
    pairs = [(0, 1), (1, 2), (4, 0), (3, 3), (16, 5)]
    found, expected = ([random(17, width, dtype=dtype, seed=i) for i in range(9)] for _ in range(2))
    copy_blocks(found, pairs)
    copy_blocks_reference(expected, pairs)
    assert all(map(torch.equal, found, expected))
    touch(found)
    touch_reference(expected)
    assert all(map(torch.equal, found, expected))


def views(rows: int, size: int) -> list[torch.Tensor]:
    """The same logits together, as columns of something wider, and as every other row."""
    logits = random(rows, size) * 3
    wide, sparse = part_of_wider(rows, size, torch.float32), torch.full((2 * rows, size), torch.nan)
    wide.copy_(logits)
    sparse[::2] = logits
    return [logits, wide, sparse[::2]]


@pytest.mark.parametrize("size", VOCABULARIES)
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_the_best_and_draws(size: int, rows: int) -> None:
    uniform = torch.linspace(0.01, 0.99, 2 * rows, dtype=torch.float64)[::2]
    for logits in views(rows, size):
        value, index = best(logits)
        wanted = best_reference(logits)
        assert torch.equal(value, wanted[0])
        assert torch.equal(index, wanted[1])
        assert torch.equal(draw(logits, value, uniform), draw_reference(logits, value, uniform))


@pytest.mark.parametrize("size", VOCABULARIES)
def test_divisions_over_views(size: int) -> None:
    by = torch.linspace(0.1, 3.0, 10)[::2]
    for logits in views(5, size):
        expected = divide_reference(logits.clone(), by)
        assert torch.equal(divide(logits, by), expected)
        assert torch.equal(logits, expected), "in place"


@pytest.mark.parametrize("size", VOCABULARIES)
@pytest.mark.parametrize("p", [0.1, 0.9, 0.999, 1.0])
def test_top_p_over_views(size: int, p: float) -> None:
    for logits in views(5, size):
        expected = top_p_reference(logits.clone(), torch.full((5,), p))
        assert torch.equal(top_p(logits, torch.full((10,), p)[::2]), expected)
        assert torch.equal(logits, expected), "in place"


@pytest.mark.parametrize("size", [100, 5001, 50_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_top_p_of_almost_one_keeps_almost_all(size: int, spread: float) -> None:
    """Sums in float32 do not reach it; the best token alone is no answer."""
    shares = torch.tensor([1.0, 1 - 2**-24, 1 - 2**-23, 1 - 2**-22])
    logits = random(len(shares), size) * spread
    kept = torch.isfinite(top_p(logits.clone(), shares))
    mass = logits.double().softmax(-1)
    assert ((mass * kept).sum(-1) >= shares.double() - 1e-6).all()
    assert kept[0].all()


@EACH_DTYPE
@pytest.mark.parametrize("size", VOCABULARIES)
def test_logprobs_over_views(dtype: torch.dtype, size: int) -> None:
    ids = torch.arange(17) % size
    for logits in (part_of_wider(17, size, dtype), random(size, 17, dtype=dtype).T):
        for k in {0, 1, min(size, 20), min(size, 256)}:
            found, expected = token_logprobs(logits, ids, k), token_logprobs_reference(logits, ids, k)
            torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-6, atol=1e-5)
            assert torch.equal(found.token_ids, expected.token_ids)
            assert torch.equal(found.ranks, expected.ranks)


@EACH_DTYPE
def test_weights_that_are_views(dtype: torch.dtype) -> None:
    x, weight, wide = random(5, 33, dtype=dtype), random(20, 33, dtype=dtype, seed=1), random(66, dtype=dtype, seed=2)
    found = product(x, pack(weight.clone()), WeightShape(20, 33), wide[:40:2])
    assert_close(found, product_reference(x, weight, wide[:40:2]), 33)
    assert_close(rms_norm(x, wide[::2], 1e-5), rms_norm_reference(x, wide[::2], 1e-5), 4)
    assert_close(rms_norm_add(x, x, wide[::2], 1e-5)[0], rms_norm_reference(x + x, wide[::2], 1e-5), 4)


@EACH_DTYPE
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(0, 32, dtype=dtype), random(8, 32, dtype=dtype)
    assert product(x, pack(weight.clone()), WeightShape(8, 32)).shape == (0, 8)
    assert lookup(torch.zeros(0, dtype=torch.int64), weight).shape == rms_norm(x, weight[0], 1e-5).shape == (0, 32)
    assert gated_mul(x, Finish.SILU).shape == (0, 16)
    assert best(torch.zeros(0, 7))[1].shape == (0,)


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: product(x, pack(torch.ones(3, 9)), WeightShape(3, 9), torch.ones(2)), r"\(2,\) torch.float32 is no bias of 3 torch.float32 features"),
    (lambda x: product(x, pack(torch.ones(3, 9)), WeightShape(3, 9), torch.ones(3).bfloat16()), "torch.bfloat16 is no bias"),
    (lambda x: rms_norm(x, torch.ones(8), 1e-5), "must match"), (lambda x: rms_norm_add(x, x[:, :8], torch.ones(9), 1e-5), "must match"),
    (lambda x: gated_mul(x, Finish.SILU), "must match"),
], ids=["bias", "bias's dtype", "norm", "residual", "activation"])
def test_what_would_read_out_of_bounds_is_refused(call: Callable[[torch.Tensor], object], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(torch.ones(4, 9))


@pytest.mark.parametrize("call", [
    lambda x: product(x[:, ::2], pack(torch.ones(3, 8)), WeightShape(3, 8)), lambda x: rms_norm(x[:, ::2], torch.ones(8), 1e-5),
    lambda x: gated_mul(x[:, ::2], Finish.SILU), lambda x: token_logprobs(x[:, ::2], torch.zeros(4, dtype=torch.int64), 3).logprobs,
], ids=["product", "norm", "activation", "logprobs"])
def test_elements_that_lie_apart_are_taken_as_they_are_meant(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = random(4, 16)
    together = torch.zeros(4, 16)
    together[:, ::2] = x[:, ::2]
    assert torch.equal(call(x), call(together))
