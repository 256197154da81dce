"""Writes of a step's keys and values on a GPU: our Triton kernels beside their plain-torch references, and against a copy's rate.

Timed as attention is, see `gpu_attention`; each result is first compared with the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from gpu_attention import COLD_BYTES, Heads, Limits, median_s
from gpu_table import Section, microseconds, percent, ratio
from torch import Tensor

from kvloom_kernels.attention import norm_rope_write_reference, paged_write_reference
from kvloom_kernels.gpu.attention import norm_rope_write_gpu, paged_write

TOKENS = (1, 64, 256, 8192)
"""Of a step: three of decoding, one of prompts."""
TOLERANCE = 2e-2
"""Relative to the norm of the reference. Triton's interpreter is wrong by 1e-2: it cuts off where a GPU rounds, three times."""
MOST_TURNS = 64
EPS = 1e-6
Call = Callable[[int], object]


class WriteCase:
    """A step's queries, keys and values as one product leaves them, and so many slots of a cache that each turn has its own."""

    def __init__(self, tokens: int, heads: Heads, device: str, cold_bytes: int = COLD_BYTES) -> None:
        self.tokens, self.heads, self.device = tokens, heads, device
        blocks = -(-max(cold_bytes // heads.token_bytes, tokens) // heads.block_tokens)
        shape = (blocks, heads.kv, heads.block_tokens, heads.dim)
        self.caches = [torch.zeros(shape, device=device, dtype=torch.bfloat16) for _ in range(2)]
        self.turns = min(MOST_TURNS, blocks * heads.block_tokens // tokens)
        self.slots = torch.randperm(blocks * heads.block_tokens, device=device)[:self.turns * tokens].view(self.turns, tokens)
        counts = (heads.query, heads.kv, heads.kv)
        self.qkv = torch.randn(tokens, sum(counts) * heads.dim, device=device, dtype=torch.bfloat16)
        self.parts: tuple[Tensor, ...] = self.qkv.view(tokens, -1, heads.dim).split(counts, 1)  # [T, heads, D] each
        angles = 6.3 * torch.rand(tokens, heads.dim // 2, device=device)
        self.rotation = (torch.cat((angles.cos(), angles.sin()), 1), torch.randperm(tokens, device=device))
        q_norm, k_norm = (1 + 0.3 * torch.randn(2, heads.dim, device=device)).bfloat16()
        self.norms = (q_norm, k_norm)

    def write(self, turn: int) -> None:
        """Keys and values, a launch each."""
        for new, cache in zip(self.parts[1:], self.caches, strict=True):
            paged_write(new, cache, self.slots[turn])

    def write_reference(self, turn: int) -> None:
        """The same in torch."""
        for new, cache in zip(self.parts[1:], self.caches, strict=True):
            paged_write_reference(new, cache, self.slots[turn])

    def norm_rope_write(self, turn: int) -> None:
        """Norms and rotation of queries and keys too, in one launch."""
        q, k, v = self.parts
        norm_rope_write_gpu(q, k, v, self.caches[0], self.caches[1], self.slots[turn], *self.rotation, self.norms, EPS)

    def norm_rope_write_reference(self, turn: int) -> None:
        """The same in torch."""
        q, k, v = self.parts
        norm_rope_write_reference(q, k, v, self.caches[0], self.caches[1], self.slots[turn], self.rotation, self.norms, EPS)

    def outcome(self, call: Call) -> list[Tensor]:
        """What a call makes of the heads, and of the first turn's slots of empty caches. The heads are left as they were."""
        before, block_tokens = self.qkv.clone(), self.heads.block_tokens
        for cache in self.caches:
            cache.zero_()
        call(0)
        kept = [cache[self.slots[0] // block_tokens, :, self.slots[0] % block_tokens] for cache in self.caches]
        found = [self.qkv.float(), *(x.float() for x in kept)]
        self.qkv.copy_(before)
        return found

    def error(self, ours: Call, theirs: Call) -> float:
        """The greatest of a tensor, relative to the norm of the reference's."""
        pairs = zip(self.outcome(ours), self.outcome(theirs), strict=True)
        return float(torch.stack([(got - expected).norm() / expected.norm() for got, expected in pairs]).max())


class Measured(NamedTuple):
    """A kernel's seconds and the reference's of one step, the bytes that must be moved, and our relative error."""

    kernel: str
    tokens: int
    ours_s: float
    torch_s: float
    least_bytes: int
    error: float


def measure(tokens: int, device: str, heads: Heads, cold_bytes: int = COLD_BYTES) -> list[Measured]:
    """Check, then time both kernels."""
    case = WriteCase(tokens, heads, device, cold_bytes)
    cache_bytes, query_bytes = tokens * heads.token_bytes, tokens * heads.query * heads.dim * 2
    # Read and written; in place queries and keys too, with a row of float32 factors.
    least_bytes = {"write_kernel": 2 * cache_bytes,
                   "norm_rope_write_kernel": 2 * cache_bytes + 2 * query_bytes + cache_bytes // 2 + tokens * heads.dim * 4}
    calls = {"write_kernel": (case.write, case.write_reference),
             "norm_rope_write_kernel": (case.norm_rope_write, case.norm_rope_write_reference)}

    def seconds(call: Call) -> float:
        return median_s([lambda turn=turn: call(turn) for turn in range(case.turns)], device)

    return [Measured(kernel, tokens, seconds(ours), seconds(theirs), least_bytes[kernel], error)
            for kernel, (ours, theirs) in calls.items() for error in [case.error(ours, theirs)]]


def section(found: Sequence[Measured], card: Limits, heads: Heads) -> Section:
    """The table."""
    note = (f"{heads.query} query heads, {heads.kv} kv heads of {heads.dim}, bfloat16, blocks of {heads.block_tokens} tokens; keys and "
            "values of one layer. Torch's side is the kernel's reference, in several launches. What fits into the card's caches is not "
            "written to memory at once, and may be faster than a copy.")
    failures = tuple(f"{m.kernel}, {m.tokens} tokens: the error is {m.error:.1e} of the norm" for m in found if not m.error < TOLERANCE)
    return Section("Cache writes", ("kernel", "tokens", "us", "share of the copy's rate", "torch, us", "torch / ours"),
                   tuple((m.kernel, str(m.tokens), microseconds(m.ours_s), percent(m.least_bytes / m.ours_s / card.copy_bytes_s),
                          microseconds(m.torch_s), ratio(m.torch_s, m.ours_s)) for m in found), (note,), failures)


def run(device: str, card: Limits, tokens: Sequence[int] = TOKENS, heads: Heads | None = None, cold_bytes: int = COLD_BYTES) -> Section:
    """Measure all of it."""
    heads = heads or Heads()
    return section([m for n in tokens for m in measure(n, device, heads, cold_bytes)], card, heads)
