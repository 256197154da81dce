"""Every attention backend against torch's own attention over unpaged tensors: odd shapes, windows, chunks, poisoned blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from kvloom.interfaces import AttentionBatch, AttentionSpec, LayerCache
from kvloom_kernels.native import problem
from kvloom_plugins.attention.cpu import CpuAttention
from kvloom_plugins.attention.reference import ReferenceAttention
from kvloom_plugins.attention.torch_batched import TorchAttention

BACKENDS = [ReferenceAttention, TorchAttention, CpuAttention]
needs_compiler = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")
EACH_BACKEND = pytest.mark.parametrize("backend", [pytest.param(b, marks=needs_compiler if b is CpuAttention else ()) for b in BACKENDS])


@dataclass
class Case:
    """Rows as (tokens before the step, tokens of the step)."""

    spec: AttentionSpec
    rows: list[tuple[int, int]]
    seed: int = 0
    filler: type | None = None
    """Another backend with the same cache, which writes the tokens before the step; the backend itself when None."""

    def run(self, backend: type, poison: float = float("nan")) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the backend gives, what torch gives), ``[T, Hq, Dv]`` each. Blocks of nobody and free slots hold `poison`."""
        s, generator = self.spec, torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, s.dtype)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(s.device, dtype)

        made = backend(s)
        columns = [-(-(before + new) // s.block_tokens) for before, new in self.rows]
        num_blocks = sum(columns) + 3
        cache = LayerCache(0, tuple(torch.full((num_blocks, *t.shape), poison, dtype=dtype, device=s.device) for t in made.state_shapes()))
        ids = torch.randperm(num_blocks - 1, generator=generator) + 1
        tables, at = [], 0
        for n in columns:
            tables.append(ids[at:at + n])
            at += n
        got, expected = [], []
        full = [(random(b + n, s.num_kv_heads, s.head_dim), random(b + n, s.num_kv_heads, s.value_dim), random(n, s.num_heads, s.head_dim))
                for b, n in self.rows]
        if any(b for b, _ in self.rows):
            self.write(self.filler(s) if self.filler else made, cache, tables, full, [(0, b) for b, _ in self.rows])
        meta = self.write(made, cache, tables, full, self.rows)
        q = torch.cat([q for _, _, q in full])
        out = torch.full((q.shape[0], s.num_heads, s.value_dim), float("nan"), dtype=dtype, device=s.device)
        got = made.attend(q, cache, meta, out)
        assert got.data_ptr() == out.data_ptr()
        expected = torch.cat([self.truth(*tensors, before) for tensors, (before, _) in zip(full, self.rows, strict=True)])
        return got.float(), expected

    def write(self, made, cache, tables, full, rows):
        """One step that writes `rows` (tokens before, tokens new); returns its metadata."""
        s = self.spec
        kept = [i for i, (_, n) in enumerate(rows) if n]
        counts = np.array([rows[i][1] for i in kept])
        contexts = np.array([sum(rows[i]) for i in kept], np.int32)
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        width = max(-(-int(c) // s.block_tokens) for c in contexts)
        table = torch.zeros(len(kept), width, dtype=torch.int32)
        slots = []
        for r, i in enumerate(kept):
            before, new = rows[i]
            used = -(-(before + new) // s.block_tokens)
            table[r, :used] = tables[i][:used]
            positions = torch.arange(before, before + new)
            slots.append(tables[i][positions // s.block_tokens] * s.block_tokens + positions % s.block_tokens)
        on_device = (x.to(s.device) for x in (torch.from_numpy(starts), torch.from_numpy(contexts), table, torch.cat(slots)))
        batch = AttentionBatch(
            *on_device,
            query_starts_host=starts, context_tokens_host=contexts, max_query_tokens=int(counts.max()), max_context_tokens=int(contexts.max()))
        meta = made.prepare(batch)
        made.write(torch.cat([full[i][0][rows[i][0]:sum(rows[i])] for i in kept]),
                   torch.cat([full[i][1][rows[i][0]:sum(rows[i])] for i in kept]), cache, meta)
        return meta

    def truth(self, keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor, before: int) -> torch.Tensor:
        s = self.spec
        query, key = torch.arange(before, before + len(q), device=s.device)[:, None], torch.arange(len(keys), device=s.device)[None]
        seen = key <= query if s.causal else torch.ones(len(q), len(keys), dtype=torch.bool, device=s.device)
        if s.window_tokens is not None:
            seen = seen & (key > query - s.window_tokens) & (key < query + s.window_tokens)
        out = scaled_dot_product_attention(*(x.double().transpose(0, 1) for x in (q, keys, values)), attn_mask=seen, scale=s.scale,
                                           enable_gqa=True)
        return out.transpose(0, 1).float()


SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=20, value_dim=20, scale=0.3, block_tokens=16)


def assert_close(case: Case, backend: type, tolerance: float = 2e-5) -> None:
    got, expected = case.run(backend)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@EACH_BACKEND
@pytest.mark.parametrize("rows", [[(0, 1)], [(0, 37)], [(15, 1), (16, 1), (17, 1)], [(5, 20), (40, 1), (0, 3)], [(300, 70), (129, 1)]],
                         ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 16, 40])
def test_prompts_chunks_and_decodes_in_one_step(backend: type, rows: list, window: int | None) -> None:
    assert_close(Case(replace(SPEC, window_tokens=window), rows), backend)


@EACH_BACKEND
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim"), [(1, 1, 8, 8), (4, 4, 64, 64), (9, 3, 64, 64), (8, 1, 128, 128), (3, 1, 7, 5),
                                                                    (70, 1, 16, 16), (2, 2, 96, 80)])
@pytest.mark.parametrize("block_tokens", [1, 5, 16, 32])
def test_head_shapes_and_block_sizes(backend: type, heads: int, kv_heads: int, dim: int, value_dim: int, block_tokens: int) -> None:
    spec = AttentionSpec(heads, kv_heads, dim, value_dim, dim ** -0.5, block_tokens=block_tokens)
    assert_close(Case(spec, [(33, 1), (0, 18), (2, 5)]), backend)


@EACH_BACKEND
@pytest.mark.parametrize("window", [None, 1, 9, 17])
def test_bidirectional(backend: type, window: int | None) -> None:
    assert_close(Case(replace(SPEC, causal=False, window_tokens=window), [(0, 25), (0, 1), (0, 40)]), backend)


@EACH_BACKEND
def test_bfloat16_is_as_close_as_its_rounding(backend: type) -> None:
    assert_close(Case(replace(SPEC, dtype="bfloat16", cache_dtype="bfloat16"), [(50, 1), (3, 30)]), backend, tolerance=2e-2)


@EACH_BACKEND
@given(rows=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=5), block_tokens=st.integers(1, 20),
       window=st.none() | st.integers(1, 60), group=st.integers(1, 5), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_random_batches(backend: type, rows: list, block_tokens: int, window: int | None, group: int, seed: int) -> None:
    spec = replace(SPEC, num_heads=2 * group, block_tokens=block_tokens, window_tokens=window)
    assert_close(Case(spec, rows, seed), backend)


@needs_compiler
@pytest.mark.parametrize("rows", [[(0, 30), (20, 1)], [(99, 1)]], ids=str)
def test_soft_cap_and_sinks_agree_with_the_reference(rows: list) -> None:
    spec = replace(SPEC, soft_cap=2.5)
    got, _ = Case(spec, rows).run(CpuAttention)
    expected, _ = Case(spec, rows).run(ReferenceAttention)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@needs_compiler
def test_sinks_take_their_part_of_the_softmax() -> None:
    case, sinks = Case(replace(SPEC, sinks=True), [(0, 5)]), torch.linspace(-1, 3, 6)
    outs = []
    for backend in (CpuAttention, ReferenceAttention):
        original = backend.attend
        made = type("Sunk", (backend,), {"attend": lambda self, q, cache, meta, out, _=original: _(self, q, cache, meta, out, sinks)})
        outs.append(case.run(made)[0])
    torch.testing.assert_close(*outs, atol=2e-5, rtol=2e-5)
    assert outs[0].norm() < case.run(ReferenceAttention)[0].norm()


@pytest.mark.parametrize(("change", "reason"), [({"cross": True}, "cross"), ({"latent": True}, "latent"), ({"cache_dtype": "float8_e4m3fn"}, "float8")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_served_is_refused_with_a_reason(backend: type, change: dict, reason: str) -> None:
    assert reason in backend.supports(replace(SPEC, **change))


def test_torch_refuses_what_it_would_ignore() -> None:
    assert "soft cap" in TorchAttention.supports(replace(SPEC, soft_cap=1.0))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_change_the_result(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Case(SPEC, [(80, 1), (0, 90)]).run(CpuAttention)[0]
        torch.set_num_threads(threads)
        assert torch.equal(one, Case(SPEC, [(80, 1), (0, 90)]).run(CpuAttention)[0])
    finally:
        torch.set_num_threads(before)
