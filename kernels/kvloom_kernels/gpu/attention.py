"""Calls of the Triton kernels over ``k [N, Hk, B, D]`` and ``v [N, Hk, B, Dv]``. Nothing here waits for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kvloom_kernels.attention import Scores
from kvloom_kernels.gpu.attend import attend_kernel, join_kernel, norm_rope_write_kernel, write_kernel
from kvloom_kernels.plan import refuse_recording

LEAST_SPLIT_TOKENS = 256
"""Of context, for one program: less is not worth joining. Not tuned: no GPU was at hand."""
MAX_SPLITS = 16


class Tiles(NamedTuple):
    """What one program takes at once: `lanes` query tokens times query heads of a kv head, `keys` of the context; by `warps`."""

    lanes: int
    keys: int
    warps: int


def padded(elements: int) -> int:
    """The power of two that holds so many, at least 16, which `tl.dot` needs."""
    return max(16, int(triton.next_power_of_2(elements)))


def attend_sizes(dim: int, value_dim: int, group: int, tile: Tiles) -> dict[str, int]:
    """Constants of `attend_kernel` that say what one program takes at once, for `group` query heads of a kv head."""
    group_pad = int(triton.next_power_of_2(group))
    return {"QUERIES": max(1, tile.lanes // group_pad), "GROUP_PAD": group_pad, "KEYS": tile.keys, "DIM_PAD": padded(dim),
            "VALUE_PAD": padded(value_dim)}


def rope_sizes(dim: int, value_dim: int, half: int) -> dict[str, int]:
    """Constants of `norm_rope_write_kernel`: powers of two that hold what it has in registers."""
    pads = {"HALF_PAD": half, "REST_PAD": max(1, dim - 2 * half), "VALUE_PAD": value_dim}
    return {name: int(triton.next_power_of_2(elements)) for name, elements in pads.items()}


def split_count(programs: int, max_context_tokens: int, wanted_programs: int = 256) -> int:
    """Among how many programs a row's context is divided, so that few sequences still fill a GPU."""
    return max(1, min(MAX_SPLITS, wanted_programs // max(programs, 1), max_context_tokens // LEAST_SPLIT_TOKENS))


def tiles(element_bytes: int, dim: int, max_query_tokens: int) -> Tiles:
    """Keep everything in registers on sm_80 and sm_90 for heads of up to 256 elements, with 4 query heads a kv head: that is what
    `scripts/compile_gpu_kernels` checks. Other groups were seen to spill 16 bytes at most, in float32, whose products need far more
    registers; only tiles of more than 64 heads spill more. Which tiles are fastest is not known: no GPU was at hand.
    """
    decoding = max_query_tokens == 1
    if element_bytes == 4:
        return Tiles(16 if decoding else 32, 16, 4 if decoding else 8)
    return Tiles(16, 32, 4) if decoding else Tiles(64, 32, 4 if padded(dim) <= 64 else 8)


def paged_write(new: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Store ``new [T, Hk, D]`` (heads side by side, tokens at any stride) at ``slots [T]`` int64 of ``cache [N, Hk, B, D]``."""
    refuse_recording("a Triton kernel")
    tokens, heads, dim = new.shape
    if tokens:
        write_kernel[(tokens, heads)](new, cache, slots, new.stride(0), heads, DIM=dim, BLOCK_TOKENS=cache.shape[2],
                                      DIM_PAD=triton.next_power_of_2(dim))


def norm_rope_write_gpu(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, table: Tensor,
                        positions: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float) -> None:
    """Per-head norms and rotation, in place on q and k, and k and v to their slots, in one launch.

    Args:
        q, k, v: ``[T, heads, D]`` each, heads side by side, tokens at any stride.
        slots: ``[T]`` int64.
        table: ``[max_model_len, Dr]`` float32, contiguous, see `kvloom.layers.Rotation`.
        positions: ``[T]`` int64.
        norms: ``[D]`` weights for q and k, of their dtype; None: no norms.
    """
    refuse_recording("a Triton kernel")
    tokens, heads, dim = q.shape
    kv_heads, value_dim, half = k.shape[1], v.shape[2], table.shape[1] // 2
    if tokens:
        q_norm, k_norm = norms or (q, k)
        norm_rope_write_kernel[(tokens, heads + kv_heads)](
            q, k, v, k_cache, v_cache, slots, table, positions, q_norm, k_norm, q.stride(0), k.stride(0), v.stride(0), heads, kv_heads,
            eps, DIM=dim, VALUE_DIM=value_dim, HALF=half, BLOCK_TOKENS=k_cache.shape[2], NORMED=norms is not None,
            **rope_sizes(dim, value_dim, half))


def paged_attention_gpu(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_starts: Tensor, context_tokens: Tensor,
                        scores: Scores, max_query_tokens: int, splits: int, out: Tensor) -> Tensor:
    """All rows of a step, ``q [T, Hq, D]`` (heads side by side) -> ``out [T, Hq, Dv]``, contiguous, filled and returned.

    Args:
        block_table: ``[R, B]`` int32, query_starts ``[R + 1]`` and context_tokens ``[R]`` int32: on the device.
        max_query_tokens: the longest row's, from the host.
        splits: see `split_count`.
    """
    refuse_recording("a Triton kernel")
    tokens, heads, dim = q.shape
    kv_heads, block_tokens, value_dim = v_cache.shape[1:]
    if not tokens:
        return out
    group = heads // kv_heads
    tile = tiles(q.element_size(), max(dim, value_dim), max_query_tokens)
    sizes = attend_sizes(dim, value_dim, group, tile)
    parts = out if splits == 1 else torch.empty(splits, tokens, heads, value_dim, dtype=torch.float32, device=q.device)
    tops, sums = (torch.empty(splits, tokens, heads, dtype=torch.float32, device=q.device) for _ in range(2))
    grid = (context_tokens.shape[0], triton.cdiv(max_query_tokens, sizes["QUERIES"]), kv_heads * splits)
    attend_kernel[grid](
        q, k_cache, v_cache, block_table, query_starts, context_tokens, parts, tops, sums, q.stride(0), block_table.stride(0),
        scores.scale, scores.soft_cap or 0.0, heads, kv_heads, tokens, splits, DIM=dim, VALUE_DIM=value_dim, GROUP=group,
        BLOCK_TOKENS=block_tokens, WINDOW=scores.window_tokens or 0, CAUSAL=scores.causal, CAPPED=scores.soft_cap is not None,
        WIDE=q.device.type == "cpu", num_warps=tile.warps, **sizes)
    if splits > 1:
        join_kernel[(tokens * heads,)](parts, tops, sums, out, tokens * heads, splits, VALUE_DIM=value_dim, VALUE_PAD=padded(value_dim))
    return out
