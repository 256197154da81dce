"""Paged attention on a GPU: our Triton kernel beside torch's own, and what the card can do in the same run.

Every figure is the median of several repetitions of a CUDA graph of calls, so that launching costs nobody; the calls go round over
blocks that no cache of the card holds together. Each result is first compared with the reference of the kernel's test.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from gpu_table import Section, microseconds, percent, ratio
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvloom_kernels.attention import Scores, paged_attention_reference
from kvloom_kernels.gpu.attention import paged_attention_gpu, split_count

ROUNDS = 9
COLD_BYTES = 2**29
"""Of keys and values that calls go round over: several times what the caches of an H100 or H200 hold (50 and 60 MB)."""
TOLERANCE = 1e-2
"""Of a bfloat16 result, relative to the norm of the reference."""


@dataclass(frozen=True)
class Heads:
    """Qwen3-0.6B's."""

    query: int = 16
    kv: int = 8
    dim: int = 128
    block_tokens: int = 16

    @property
    def token_bytes(self) -> int:
        """Of one token's key and value in bfloat16."""
        return 2 * 2 * self.kv * self.dim


class Work(NamedTuple):
    """`rows` sequences, each with `queries` new tokens, the last of `context` tokens."""

    rows: int
    queries: int
    context: int

    def least_bytes(self, heads: Heads) -> int:
        """Keys and values once, queries once, results once."""
        return self.rows * (self.context * heads.token_bytes + 2 * 2 * self.queries * heads.query * heads.dim)

    def flop(self, heads: Heads) -> float:
        """Of the two products, over what each query sees."""
        seen = self.queries * self.context - self.queries * (self.queries - 1) / 2
        return 4.0 * self.rows * seen * heads.query * heads.dim


DECODE = [Work(rows, 1, context) for rows, context in
          ((1, 1024), (1, 8192), (1, 32768), (8, 4096), (32, 1024), (32, 8192), (128, 1024), (128, 4096), (256, 512))]
PREFILL = [Work(1, 512, 512), Work(1, 4096, 4096), Work(8, 1024, 1024), Work(4, 512, 8192)]


class Limits(NamedTuple):
    """What the card can do: bytes read and written by a copy a second, operations of a bfloat16 product a second."""

    copy_bytes_s: float
    flop_s: float


def median_s(calls: Sequence[Callable[[], object]], device: str) -> float:
    """Seconds of one call, of several that are made one after the other: the median of `ROUNDS` rounds."""
    for call in calls:
        call()
    if device == "cpu":
        return statistics.median(_host_seconds(calls) for _ in range(ROUNDS)) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []
    for _ in range(ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds[1:]) / len(calls)


def _host_seconds(calls: Sequence[Callable[[], object]]) -> float:
    begun = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begun


def limits(device: str, copy_bytes: int = 2**30, size: int = 8192) -> Limits:
    """Measured now: a copy of `copy_bytes`, and a product of two square matrices of random numbers."""
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = median_s([lambda: target.copy_(source)], device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    return Limits(2 * copy_bytes / copy_s, 2 * size**3 / median_s([lambda: torch.mm(a, b, out=product)], device))


class PagedCase:
    """Random queries, and so many tables of scattered blocks that their keys and values are cold when their turn comes."""

    def __init__(self, work: Work, heads: Heads, device: str, cold_bytes: int = COLD_BYTES) -> None:
        self.work, self.heads, self.device = work, heads, device
        columns = -(-work.context // heads.block_tokens)
        self.turns = max(1, min(64, -(-cold_bytes // (work.rows * work.context * heads.token_bytes))))
        blocks = self.turns * work.rows * columns + 1
        shape = (blocks, heads.kv, heads.block_tokens, heads.dim)
        self.k_cache, self.v_cache = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        scattered = torch.randperm(blocks - 1, device=device, dtype=torch.int32) + 1
        self.tables = scattered.view(self.turns, work.rows, columns)
        self.q = torch.randn(work.rows * work.queries, heads.query, heads.dim, device=device, dtype=torch.bfloat16)
        self.starts = (torch.arange(work.rows + 1, device=device) * work.queries).int()
        self.contexts = torch.full((work.rows,), work.context, device=device, dtype=torch.int32)
        self.scores = Scores(heads.dim**-0.5)
        self.out = torch.full_like(self.q, float("nan"))

    def attend(self, turn: int) -> Tensor:
        """Ours: ``[T, Hq, D]``."""
        work = self.work
        return paged_attention_gpu(self.q, self.k_cache, self.v_cache, self.tables[turn], self.starts, self.contexts, self.scores,
                                   work.queries, split_count(work.rows * self.heads.kv, work.context), self.out)

    def error(self, rows: int = 2) -> float:
        """Of the first rows, relative to the norm of the reference, which computes on the host in float32."""
        rows = min(rows, self.work.rows)
        tokens = rows * self.work.queries
        got = self.attend(0)[:tokens].float().cpu()
        used, table = torch.unique(self.tables[0, :rows], return_inverse=True)
        k, v = (cache[used.long()].cpu() for cache in (self.k_cache, self.v_cache))
        starts, contexts = np.arange(rows + 1) * self.work.queries, np.full(rows, self.work.context)
        expected = paged_attention_reference(self.q[:tokens].cpu(), k, v, table.cpu(), starts, contexts, self.scores)
        return float((got - expected).norm() / expected.norm())

    def contiguous(self, turn: int) -> tuple[Tensor, Tensor, Tensor]:
        """What torch's attention takes: q ``[R, Hq, Q, D]``, k and v ``[R, Hk, context, D]``."""
        work, heads = self.work, self.heads
        q = self.q.view(work.rows, work.queries, heads.query, heads.dim).transpose(1, 2)
        k, v = (cache[self.tables[turn].long()].transpose(1, 2).flatten(2, 3)[:, :, :work.context] for cache in
                (self.k_cache, self.v_cache))
        return q, k.contiguous(), v.contiguous()


def torch_s(case: PagedCase, backends: Sequence[SDPBackend] = ()) -> float | None:
    """Seconds of torch's attention over contiguous keys and values; of these backends only, where any is named. None: it has none."""
    if case.work.queries not in (1, case.work.context):
        return None  # its causal masks begin at the first key
    causal = case.work.queries > 1
    tensors = [case.contiguous(turn) for turn in range(case.turns)]
    calls = [lambda a=a: scaled_dot_product_attention(*a, is_causal=causal, enable_gqa=True) for a in tensors]
    if not backends:
        return median_s(calls, case.device)
    try:
        with sdpa_kernel(list(backends)):
            return median_s(calls, case.device)
    except RuntimeError as error:
        if "No available kernel" in str(error):
            return None
        raise


class Measured(NamedTuple):
    """Seconds of a call: ours, torch's choice, torch's flash attention; and our relative error."""

    work: Work
    ours_s: float
    torch_s: float | None
    flash_s: float | None
    error: float


def measure(work: Work, device: str, heads: Heads, cold_bytes: int = COLD_BYTES) -> Measured:
    """Check, then time."""
    case = PagedCase(work, heads, device, cold_bytes)
    error = case.error()
    ours = median_s([lambda turn=turn: case.attend(turn) for turn in range(case.turns)], device)
    return Measured(work, ours, torch_s(case), torch_s(case, [SDPBackend.FLASH_ATTENTION]), error)


def failures(found: Sequence[Measured]) -> tuple[str, ...]:
    """Results that are wrong; NaN is."""
    return tuple(f"{m.work.rows} rows of {m.work.queries} tokens, context {m.work.context}: the error is {m.error:.1e} of the norm"
                 for m in found if not m.error < TOLERANCE)


def sections(decode: Sequence[Measured], prefill: Sequence[Measured], card: Limits, heads: Heads) -> list[Section]:
    """The two tables."""
    note = (f"{heads.query} query heads, {heads.kv} kv heads of {heads.dim}, bfloat16, blocks of {heads.block_tokens} tokens. A copy "
            f"moves {card.copy_bytes_s / 1e12:.2f} TB/s (read and written), a product of 8192 x 8192 x 8192 runs at "
            f"{card.flop_s / 1e12:.0f} TFLOP/s, both measured in the same run. Torch reads contiguous tensors.")
    return [
        Section("Decode attention",
                ("rows", "context", "us", "share of the copy's rate", "torch, us", "torch's flash, us", "torch / ours"),
                tuple((str(m.work.rows), str(m.work.context), microseconds(m.ours_s),
                       percent(m.work.least_bytes(heads) / m.ours_s / card.copy_bytes_s), microseconds(m.torch_s),
                       microseconds(m.flash_s), ratio(m.torch_s, m.ours_s)) for m in decode), (note,), failures(decode)),
        Section("Prefill attention",
                ("rows", "new tokens", "context", "us", "share of the product's rate", "torch, us", "torch / ours"),
                tuple((str(m.work.rows), str(m.work.queries), str(m.work.context), microseconds(m.ours_s),
                       percent(m.work.flop(heads) / m.ours_s / card.flop_s), microseconds(m.torch_s), ratio(m.torch_s, m.ours_s))
                      for m in prefill), (), failures(prefill))]


def run(device: str = "cuda", decode: Sequence[Work] = DECODE, prefill: Sequence[Work] = PREFILL, heads: Heads | None = None,
        cold_bytes: int = COLD_BYTES, card: Limits | None = None) -> list[Section]:
    """Measure all of it."""
    heads, card = heads or Heads(), card or limits(device)
    return sections([measure(work, device, heads, cold_bytes) for work in decode],
                    [measure(work, device, heads, cold_bytes) for work in prefill], card, heads)
