"""The C++ attention kernels against their plain-torch references: head sizes, query heads of a kv head, contexts, windows, soft caps.

Tensors are views of wider ones, and what nobody may read is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
from torch.nn.functional import pad

from kvloom_kernels.attention import WORKSPACE_BYTES, Scores, kernel_caches, paged_attention, paged_attention_reference
from kvloom_kernels.native import problem
from kvloom_kernels.token_attention import token_attention, token_attention_reference

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 1.5e-2}}
DIMS = [8, 64, 80, 96, 128, 256]
PEAK = 3.0
"""Standard deviation of the scores: few keys count, so results are about 1 however long the context is, and errors show."""

BLOCK = 16
CONTEXTS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 511, 512, 513, 2100]
DECODES = [(context, 1) for context in CONTEXTS]
ROWS = [*DECODES, (BLOCK, BLOCK), (BLOCK + 1, 3), (40, 40), (530, 21)]
"""Contexts with this step's tokens, and those."""


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """With two, long contexts are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def heads_of(tokens: int, heads: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """``[tokens, heads, dim]``, tokens further apart than their heads are long, as a part of a fused product has them."""
    wide = torch.randn(tokens, heads * dim + 8, generator=generator).to(dtype)
    return wide[:, 4:4 + heads * dim].unflatten(1, (heads, dim))


def assert_paged(rows: list[tuple[int, int]], scores: Scores, dtype: torch.dtype, group: int, dim: int, value_dim: int, block_tokens: int,
                 kv_heads: int = 2) -> None:
    """Blocks of a row lie anywhere; slots beyond its context, and block 0, hold NaN."""
    generator = torch.Generator().manual_seed(dim + group)
    columns = [-(-context // block_tokens) for context, _ in rows]
    k_cache, v_cache = (torch.full((1 + sum(columns), kv_heads, block_tokens, d), torch.nan, dtype=dtype) for d in (dim, value_dim))
    ids = (torch.randperm(sum(columns), generator=generator) + 1).int()
    table = torch.zeros(len(rows), max(columns) + 3, dtype=torch.int32)[:, 1:1 + max(columns)]
    for r, (part, (context, _)) in enumerate(zip(ids.split(columns), rows, strict=True)):
        table[r, :len(part)] = part
        places = torch.arange(context)
        for cache in (k_cache, v_cache):
            cache[part[places // block_tokens].long(), :, places % block_tokens] = torch.randn(
                context, kv_heads, cache.shape[3], generator=generator).to(dtype)
    starts = torch.tensor([0, *(new for _, new in rows)]).cumsum(0).int()
    contexts = torch.tensor([context for context, _ in rows], dtype=torch.int32)
    q = heads_of(int(starts[-1]), kv_heads * group, dim, dtype, generator)
    out = torch.full((len(q), kv_heads * group, value_dim), torch.nan, dtype=dtype)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8)
    got = paged_attention(q, *kernel_caches(k_cache, v_cache), table, starts, contexts, scores, block_tokens, workspace, out)
    expected = paged_attention_reference(q, k_cache, v_cache, table, starts.numpy(), contexts.numpy(), scores)
    torch.testing.assert_close(got.float(), expected, **TOLERANCE[dtype])


@EACH_DTYPE
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("group", range(1, 9))
def test_paged_attention_of_each_head_size_and_group(dtype: torch.dtype, dim: int, group: int) -> None:
    assert_paged(ROWS, Scores(PEAK * dim**-0.5), dtype, group, dim, dim, BLOCK)


@EACH_DTYPE
@pytest.mark.parametrize("dim", [20, 64])
@pytest.mark.parametrize("window", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 500, 512, 1500])
@pytest.mark.parametrize("soft_cap", [None, 4.0])
def test_paged_attention_with_windows_and_soft_caps(dtype: torch.dtype, dim: int, window: int, soft_cap: float | None) -> None:
    assert_paged(ROWS, Scores(PEAK * dim**-0.5, window, soft_cap), dtype, 3, dim, dim, BLOCK)


@EACH_DTYPE
@pytest.mark.parametrize("block_tokens", [1, 2, 5, 8, 24, 32, 64])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (7, 5), (80, 48), (128, 96)])
def test_paged_attention_at_the_borders_of_blocks(dtype: torch.dtype, block_tokens: int, dim: int, value_dim: int) -> None:
    contexts = {1, max(1, block_tokens - 1), block_tokens, block_tokens + 1, 3 * block_tokens, 700}
    rows = [(context, new) for context in sorted(contexts) for new in (1, 2, 7) if new <= context]
    assert_paged(rows, Scores(PEAK * dim**-0.5), dtype, 3, dim, value_dim, block_tokens)


@EACH_DTYPE
@pytest.mark.parametrize(("context", "soft_cap", "block_tokens", "group"), [
    *((1025, None, BLOCK, group) for group in (1, 3, 5, 8, 20)), (1300, None, 24, 3), (1300, None, 24, 8), (5000, 4.0, BLOCK, 1), (5000, 4.0, BLOCK, 5)])
def test_paged_attention_of_one_long_context(dtype: torch.dtype, group: int, soft_cap: float | None, context: int, block_tokens: int,
                                             threads: int) -> None:
    assert_paged([(context, 1)], Scores(PEAK / 8, None, soft_cap), dtype, group, 64, 64, block_tokens, kv_heads=1)
    assert_paged([(context, 1), (context - 512, 5)], Scores(PEAK / 8, 1100, soft_cap), dtype, group, 64, 64, block_tokens, kv_heads=3)


@EACH_DTYPE
@pytest.mark.parametrize("window", [None, 9, 100])
@pytest.mark.parametrize("soft_cap", [None, 4.0])
def test_paged_attention_that_sees_what_comes_after(dtype: torch.dtype, window: int | None, soft_cap: float | None) -> None:
    rows = [(tokens, tokens) for tokens in (1, BLOCK - 1, BLOCK, BLOCK + 1, 530)]
    assert_paged(rows, Scores(PEAK / 8, window, soft_cap, causal=False), dtype, 3, 64, 64, BLOCK)


def assert_tokens(rows: list[int], scores: Scores, dtype: torch.dtype, group: int, dim: int, value_dim: int, kv_heads: int = 2) -> None:
    generator = torch.Generator().manual_seed(dim + group)
    q, k, v = (heads_of(sum(rows), h, d, dtype, generator)
               for h, d in ((kv_heads * group, dim), (kv_heads, dim), (kv_heads, value_dim)))
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    out = torch.full((len(q), kv_heads * group, value_dim), torch.nan, dtype=dtype)
    got = token_attention(q, k, v, starts, scores, out)
    torch.testing.assert_close(got.float(), token_attention_reference(q, k, v, starts.numpy(), scores), **TOLERANCE[dtype])


@EACH_DTYPE
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("group", range(1, 9))
def test_token_attention_of_each_head_size_and_group(dtype: torch.dtype, dim: int, group: int) -> None:
    assert_tokens([1, 2, 15, 16, 17, 33, 64, 65, 200], Scores(PEAK * dim**-0.5, causal=False), dtype, group, dim, dim)


@EACH_DTYPE
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (7, 5), (80, 48)])
@pytest.mark.parametrize("window", [None, 1, 16, 65])
@pytest.mark.parametrize("soft_cap", [None, 4.0])
@pytest.mark.parametrize("causal", [False, True])
def test_token_attention_with_windows_and_soft_caps(dtype: torch.dtype, dim: int, value_dim: int, window: int | None, soft_cap: float | None,
                                                    causal: bool) -> None:
    assert_tokens([1, 16, 17, 64, 300], Scores(PEAK * dim**-0.5, window, soft_cap, causal), dtype, 3, dim, value_dim)


@EACH_DTYPE
def test_token_attention_over_thousands(dtype: torch.dtype, threads: int) -> None:
    assert_tokens([2050, 1, 1023], Scores(PEAK / 8, causal=False), dtype, 2, 64, 64, kv_heads=1)


@EACH_DTYPE
@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize("context", [29, 77, 600])
def test_the_bits_of_a_query_are_the_same_however_many_are_computed_with_it(dtype: torch.dtype, group: int, context: int) -> None:
    """Rows are taken some at a time, and keys in groups: whichever a query falls in, its sums have one order."""
    generator, dim, kv_heads = torch.Generator().manual_seed(context), 72, 2
    blocks = -(-context // BLOCK)
    caches = [torch.randn(blocks, kv_heads, BLOCK, dim, generator=generator).to(dtype) for _ in range(2)]
    table, contexts = torch.arange(blocks, dtype=torch.int32)[None], torch.tensor([context], dtype=torch.int32)
    q = heads_of(context, kv_heads * group, dim, dtype, generator)

    def last(count: int) -> torch.Tensor:
        out, workspace = torch.empty(count, kv_heads * group, dim, dtype=dtype), torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8)
        return paged_attention(q[-count:], *kernel_caches(*caches), table, torch.tensor([0, count], dtype=torch.int32), contexts,
                               Scores(PEAK * dim**-0.5), BLOCK, workspace, out)[-1]

    alone = last(1)
    assert torch.isfinite(alone).all()
    for count in (2, 3, 4, 5, 6, 7, 13, 22, context):
        assert torch.equal(last(count), alone), count


@EACH_DTYPE
@pytest.mark.parametrize("rows", [[(40, 1)] * 9, [(40, 1), (0, 23), (17, 4)], [(600, 1)]], ids=["decoding", "mixed", "long"])
def test_ranges_beyond_the_step_are_empty(dtype: torch.dtype, rows: list[tuple[int, int]], threads: int) -> None:
    """Recorded steps have more ranges than there are, which begin where the last one ends, and queries that are nobody's."""
    generator, dim, heads, empty_ranges, others = torch.Generator().manual_seed(0), 64, 4, 30, 40
    blocks = -(-max(before + new for before, new in rows) // BLOCK)
    caches = kernel_caches(*(torch.randn(blocks * len(rows), 2, BLOCK, dim, generator=generator).to(dtype) for _ in range(2)))
    tables = torch.arange(blocks * len(rows), dtype=torch.int32).view(len(rows), blocks)
    starts = torch.tensor([0, *accumulate(new for _, new in rows)], dtype=torch.int32)
    contexts, tokens = torch.tensor([before + new for before, new in rows], dtype=torch.int32), int(starts[-1])
    q = heads_of(tokens + others, heads, dim, dtype, generator)

    def attended(q: torch.Tensor, tables: torch.Tensor, starts: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        out, workspace = torch.full_like(q, 7), torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8)
        return paged_attention(q, *caches, tables, starts, contexts, Scores(PEAK / 8), BLOCK, workspace, out)

    expected = attended(q[:tokens], tables, starts, contexts)
    found = attended(q, pad(tables, (0, 0, 0, empty_ranges), value=10**6), pad(starts, (0, empty_ranges), value=tokens),
                     pad(contexts, (0, empty_ranges)))
    assert torch.equal(found[:tokens], expected)
    assert (found[tokens:] == 7).all()
