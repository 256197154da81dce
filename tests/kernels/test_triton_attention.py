"""The Triton backend against torch's own attention and the plain reference: on a GPU, or interpreted where there is none.

On a GPU there are more shapes, and larger ones: the interpreter takes seconds for a context of thousands.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton: install kvloom[gpu]")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("there is no GPU: set TRITON_INTERPRET=1, which runs the kernels interpreted", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import SPEC as HOST_SPEC
from test_attention import Case, assert_close

from kvloom.interfaces import AttentionBatch, AttentionSpec, LayerCache
from kvloom_kernels.attention import Scores, norm_rope_write_reference, paged_attention_reference, paged_write_reference
from kvloom_kernels.gpu.attention import MAX_SPLITS, paged_attention_gpu, paged_write, split_count
from kvloom_kernels.native import problem
from kvloom_kernels.plan import NotRecordableError, Plan, recorded
from kvloom_plugins.attention.reference import ReferenceAttention
from kvloom_plugins.attention.triton import TritonAttention

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"
SPEC = replace(HOST_SPEC, device=DEVICE)
FILLER = None if ON_GPU else ReferenceAttention
"""The interpreter takes 5 ms to write a token: where the tokens before the step are many, or no writes are tested, torch writes them."""
LONG = [([(2100, 1)], None), ([(1500, 1), (600, 3)], 300)]
"""Rows whose context is divided, and a window."""
if ON_GPU:
    LONG += [(rows, window) for rows in ([(32_000, 1)], [(9000, 1), (4095, 1), (4096, 1), (4097, 1)], [(5000, 700), (8191, 1), (0, 2500)])
             for window in (None, 1, 1000)]
HEADS = [(1, 1, 8, 8), (8, 1, 128, 128), (3, 1, 7, 5), (2, 2, 80, 96), (6, 2, 96, 96), (5, 1, 112, 112), (2, 1, 64, 64),
         (2, 1, 256, 256), (1, 1, 80, 80)]
"""Query heads, kv heads, elements of a key and of a value."""
BLOCK_TOKENS = [1, 5, 16, 32]


@pytest.mark.parametrize("rows", [[(0, 1)], [(0, 37)], [(15, 1), (16, 1)], [(5, 20), (40, 1), (0, 3)]], ids=str)
@pytest.mark.parametrize("window", [None, 1, 16, 40])
def test_prompts_chunks_and_decodes_in_one_step(rows: list, window: int | None) -> None:
    assert_close(Case(replace(SPEC, window_tokens=window), rows), TritonAttention)


@pytest.mark.parametrize(("rows", "window"), LONG, ids=str)
def test_a_long_context_is_divided_among_programs(rows: list, window: int | None) -> None:
    assert split_count(len(rows) * SPEC.num_kv_heads, max(map(sum, rows))) > 4
    assert_close(Case(replace(SPEC, window_tokens=window), rows, filler=FILLER), TritonAttention)


@pytest.mark.parametrize(("shape", "block_tokens"), [(shape, b) for i, shape in enumerate(HEADS) for j, b in enumerate(BLOCK_TOKENS)
                                                    if j == i % len(BLOCK_TOKENS) or (ON_GPU and (i + j) % 2)], ids=str)
def test_head_shapes_and_block_sizes(shape: tuple[int, int, int, int], block_tokens: int) -> None:
    spec = AttentionSpec(*shape, shape[2] ** -0.5, block_tokens=block_tokens, device=DEVICE)
    assert_close(Case(spec, [(33, 1), (0, 18), (2, 5)]), TritonAttention)


@pytest.mark.parametrize(("dim", "value_dim", "splits", "scores"), [
    (64, 64, 1, Scores(0.125)), (64, 64, 3, Scores(0.25, window_tokens=20, soft_cap=4.0)), (80, 80, 3, Scores(0.125)), (7, 5, 2, Scores(0.3))],
    ids=["64", "64 in 3", "80 in 3", "7 and 5 in 2"])
def test_contexts_however_divided_agree_with_the_plain_reference(dim: int, value_dim: int, splits: int, scores: Scores) -> None:
    """Also where programs are left without a key; blocks of nobody hold NaN."""
    generator, rows, heads, kv_heads, block_tokens, columns = torch.Generator().manual_seed(dim), [(5, 1), (40, 1), (60, 6)], 4, 2, 16, 4
    contexts = torch.tensor([context for context, _ in rows])
    starts = torch.tensor([0, *(new for _, new in rows)]).cumsum(0)
    q = torch.randn(int(starts[-1]), heads, dim, generator=generator)
    table = (torch.randperm(3 * columns, generator=generator) + 1).int().view(3, columns)
    caches = [torch.full((1 + 3 * columns, kv_heads, block_tokens, d), torch.nan) for d in (dim, value_dim)]
    for row, (context, _) in zip(table, rows, strict=True):
        used = row[:-(-context // block_tokens)].long()
        for cache in caches:
            cache[used] = torch.randn(len(used), *cache.shape[1:], generator=generator)
    expected = paged_attention_reference(q, *caches, table, starts.numpy(), contexts.numpy(), scores)
    on_device = [x.to(DEVICE) for x in (q, *caches, table, starts.int(), contexts.int())]
    out = torch.full((len(q), heads, value_dim), torch.nan, device=DEVICE)
    got = paged_attention_gpu(*on_device, scores, 6, splits, out)
    torch.testing.assert_close(got.cpu(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("group", [*range(1, 9), 70])
def test_query_heads_of_one_kv_head_in_one_tile(group: int) -> None:
    spec = AttentionSpec(2 * group, 2, 16, 16, 0.25, device=DEVICE)
    assert_close(Case(spec, [(16, 1), (0, 1), (47, 1)], filler=FILLER), TritonAttention)
    assert_close(Case(spec, [(15, 17), (31, 1)], filler=FILLER), TritonAttention)


@pytest.mark.skipif(not ON_GPU, reason="a batch of real size takes the interpreter minutes: needs a GPU")
@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "dim"), [
    *(("bfloat16", *shape) for shape in [(32, 8, 64), (32, 8, 128), (16, 8, 128), (16, 2, 256), (20, 20, 80), (14, 2, 96)]),
    *((dtype, *shape) for dtype in ("float16", "float32") for shape in [(32, 8, 128), (16, 2, 256)])])
def test_batches_of_real_size(dtype: str, heads: int, kv_heads: int, dim: int) -> None:
    tolerance = {"float32": 5e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    spec = AttentionSpec(heads, kv_heads, dim, dim, dim ** -0.5, dtype=dtype, cache_dtype=dtype, device=DEVICE)
    assert_close(Case(spec, [(17 * i % 3000, 1) for i in range(130)]), TritonAttention, tolerance)
    assert_close(Case(spec, [(0, 700), (2000, 512), (1023, 1), (1024, 1)]), TritonAttention, tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("kv_heads", "dim", "block_tokens"), [(1, 8, 16), (3, 7, 5), (2, 80, 1), (2, 112, 32), (8, 128, 16), (1, 256, 16)])
def test_a_write_puts_each_token_in_its_slot_and_touches_nothing_else(kv_heads: int, dim: int, block_tokens: int, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(19, 3 * kv_heads * dim, generator=generator).to(DEVICE, getattr(torch, dtype))
    new = fused[:, kv_heads * dim:2 * kv_heads * dim].view(19, kv_heads, dim)  # between others, as keys are in a fused product
    slots = torch.randperm(25 * block_tokens, generator=generator)[:19].to(DEVICE)
    cache = torch.full((25, kv_heads, block_tokens, dim), 7.0, dtype=new.dtype, device=DEVICE)
    expected = cache.clone()
    paged_write_reference(new, expected, slots)
    paged_write(new, cache, slots)
    assert torch.equal(cache, expected)
    paged_write(new[:0], cache, slots[:0])
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("window", [None, 9])
def test_bidirectional(window: int | None) -> None:
    assert_close(Case(replace(SPEC, causal=False, window_tokens=window), [(0, 25), (0, 1), (0, 40)]), TritonAttention)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_half_precision_is_as_close_as_its_rounding(dtype: str, tolerance: float) -> None:
    assert_close(Case(replace(SPEC, dtype=dtype, cache_dtype=dtype), [(600, 1), (3, 30)], filler=FILLER), TritonAttention, tolerance)


def test_soft_cap_agrees_with_the_reference() -> None:
    case = Case(replace(SPEC, soft_cap=2.5), [(0, 30), (20, 1)])
    expected = replace(case, spec=replace(case.spec, device="cpu")).run(ReferenceAttention)[0]
    torch.testing.assert_close(case.run(TritonAttention)[0].cpu(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim", "rotary_dim"),
                         [(6, 2, 20, 20, 20), (1, 1, 8, 8, 8), (8, 1, 128, 128, 128), (3, 3, 14, 5, 6), (4, 2, 80, 96, 40), (2, 1, 2, 1, 2)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance", "block_tokens"), [("float32", 2e-6, 5), ("bfloat16", 3e-2, 16)])
def test_norm_rotation_and_write_in_one_launch(heads: int, kv_heads: int, dim: int, value_dim: int, rotary_dim: int, normed: bool, dtype: str,
                                               tolerance: float, block_tokens: int) -> None:
    generator, kind = torch.Generator().manual_seed(dim), getattr(torch, dtype)
    spec = AttentionSpec(heads, kv_heads, dim, value_dim, dim ** -0.5, dtype=dtype, cache_dtype=dtype, device=DEVICE,
                         block_tokens=block_tokens)
    backend = TritonAttention(spec)
    tokens, widths = 7, (heads * dim, kv_heads * dim, kv_heads * value_dim)
    qkv = torch.randn(tokens, sum(widths), generator=generator).to(DEVICE, kind)  # as the projection leaves them: one row a token
    angles = torch.arange(50)[:, None] * torch.rand(rotary_dim // 2, generator=generator)
    table = torch.cat((angles.cos(), angles.sin()), -1).to(DEVICE)
    positions = torch.randint(0, 50, (tokens,), generator=generator).to(DEVICE)
    norms = tuple((1 + 0.3 * torch.randn(dim, generator=generator)).to(DEVICE, kind) for _ in range(2)) if normed else None
    slots = torch.randperm(6 * block_tokens, generator=generator)[:tokens].to(DEVICE)
    batch = replace(_batch([(30, 1)] * tokens, 1), slots=slots)

    def parts():
        return [x.view(tokens, -1, d) for x, d in zip(qkv.clone().split(widths, 1), (dim, dim, value_dim), strict=True)]

    caches = [tuple(torch.full((6, *t.shape), 0.25, dtype=kind, device=DEVICE) for t in backend.state_shapes()) for _ in range(2)]
    (q, k, v), plain = parts(), parts()
    assert backend.norm_rope_write(q, k, v, LayerCache(0, caches[0]), backend.prepare(batch), table, positions, *(norms or (None, None)), 1e-5)
    norm_rope_write_reference(*plain, *caches[1], slots, (table, positions), norms, 1e-5)
    for got, expected in zip((q, k, *caches[0]), (*plain[:2], *caches[1]), strict=True):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(v, parts()[2])


def test_heads_that_lie_apart_are_left_to_the_layer() -> None:
    backend, q = TritonAttention(SPEC), torch.zeros(3, 20, 6, device=DEVICE).transpose(1, 2)
    cache = LayerCache(0, tuple(torch.zeros((4, *t.shape), device=DEVICE) for t in backend.state_shapes()))
    k, v, table = torch.zeros(3, 2, 20, device=DEVICE), torch.zeros(3, 2, 20, device=DEVICE), torch.zeros(9, 20, device=DEVICE)
    meta = backend.prepare(_batch([(3, 1)] * 3, 1))
    assert not backend.norm_rope_write(q, k, v, cache, meta, table, torch.zeros(3, dtype=torch.int64, device=DEVICE), None, None, 0.0)


@given(rows=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 20)), min_size=1, max_size=3), block_tokens=st.integers(1, 20),
       window=st.none() | st.integers(1, 60), group=st.integers(1, 8), seed=st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_random_batches(rows: list, block_tokens: int, window: int | None, group: int, seed: int) -> None:
    assert_close(Case(replace(SPEC, num_heads=2 * group, block_tokens=block_tokens, window_tokens=window), rows, seed, FILLER), TritonAttention)


def test_few_sequences_of_long_contexts_are_split_and_many_are_not() -> None:
    assert split_count(2, 10_000) == MAX_SPLITS
    assert split_count(2, 100) == split_count(1000, 10_000) == 1


def _batch(rows: list[tuple[int, int]], first_block: int) -> AttentionBatch:
    """Rows as (tokens before, tokens new), in blocks of their own of 16 tokens."""
    counts, contexts = [n for _, n in rows], [b + n for b, n in rows]
    starts = np.cumsum([0, *counts]).astype(np.int32)
    width = max(-(-c // 16) for c in contexts)
    table = first_block + torch.arange(len(rows) * width, dtype=torch.int32).view(len(rows), width)
    slots = torch.cat([table[r, torch.arange(b, b + n) // 16].long() * 16 + torch.arange(b, b + n) % 16 for r, (b, n) in enumerate(rows)])
    on_device = (x.to(DEVICE) for x in (torch.from_numpy(starts), torch.tensor(contexts, dtype=torch.int32), table, slots))
    return AttentionBatch(*on_device, starts, np.array(contexts, np.int32), max(counts), max(contexts))


def test_the_same_launch_serves_other_numbers_in_the_batchs_memory() -> None:
    backend = TritonAttention(SPEC)
    caches = [LayerCache(0, tuple(torch.full((24, *t.shape), 0.25, device=DEVICE) for t in backend.state_shapes())) for _ in range(2)]
    q, k, v = (torch.randn(3, heads, 20, device=DEVICE) for heads in (6, 2, 2))
    wanted, captured = _batch([(30, 1), (5, 1), (17, 1)], 15), _batch([(40, 1), (20, 1), (33, 1)], 1)
    meta = backend.prepare(captured)
    for to, values in ((captured.context_tokens, wanted.context_tokens), (captured.slots, wanted.slots),
                       (captured.block_table[:, :wanted.block_table.shape[1]], wanted.block_table)):
        to.copy_(values)
    assert backend.prepare(captured, meta) is meta
    results = []
    for cache, used in ((caches[0], backend.prepare(wanted)), (caches[1], meta)):
        backend.write(k, v, cache, used)
        results.append(backend.attend(q, cache, used, torch.empty(3, 6, 20, device=DEVICE)))
    torch.testing.assert_close(results[1], results[0])
    assert all(torch.equal(a, b) for a, b in zip(caches[0].tensors, caches[1].tensors, strict=True))


def test_a_plan_does_not_record_it() -> None:
    with recorded(Plan(1)), pytest.raises(NotRecordableError, match="Triton"):
        Case(SPEC, [(3, 1)]).run(TritonAttention)


def test_what_it_has_not_is_said() -> None:
    assert "sinks" in str(TritonAttention.supports(replace(SPEC, sinks=True)))
    assert "stored" in str(TritonAttention.supports(replace(SPEC, stored=False)))


def test_an_engine_gives_the_cpu_backends_tokens(small_checkpoint: Path, capfd: pytest.CaptureFixture) -> None:
    from kvloom import LLM, SamplingParams

    def tokens(backend: str, device: str) -> list:
        llm = LLM(str(small_checkpoint), dtype="float32", attention_backend=backend, device=device, max_model_len=64,
                  num_gpu_blocks_override=32)
        return [list(o.outputs[0].token_ids) for o in llm.generate(["abc", "The quick brown"], SamplingParams(temperature=0, max_tokens=5))]

    expected = tokens("reference" if problem() else "cpu", "cpu")
    capfd.readouterr()
    assert tokens("triton", DEVICE) == expected
    if not problem() and not ON_GPU:
        assert "decode steps run call by call" in "".join(capfd.readouterr())


def test_every_kernel_compiles_for_both_architectures_and_spills_nothing() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "compile_gpu_kernels")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(done.stdout.count(f"sm_{c}") >= 10 for c in (80, 90)), done.stdout
    assert "spills" not in done.stdout
    assert "registers" in done.stdout
