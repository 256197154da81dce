"""Attention over a paged KV cache: the plain reference, a C++ kernel, and a torch version for rows of one query token.

Caches are ``k [N, Hk, B, D]`` and ``v [N, Hk, B, Dv]``: N blocks of B tokens. Those of the C++ kernel are ``k [N, Hk, D / S, B, S]``
and ``v [N, Hk, B / S, Dv, S]``, where S is 2 for bfloat16 and 1 for float32, and what is beyond D or B is padding. Block-table
entries outside a row's context or window may name blocks of others; they are masked after they are read and their values are
cleared, so not even NaN gets through.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from kvloom_kernels.call import pointer
from kvloom_kernels.norm import rms_norm_reference
from kvloom_kernels.plan import run

WORKSPACE_BYTES = 8 * 2**20
"""Of `paged_attention`: enough to share 64 items of 16 query heads and 32k tokens among threads."""


class _Attend(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("q", "k_cache", "v_cache", "tables", "query_starts", "contexts", "sinks", "out",
                                                       "workspace")),
                *((name, ctypes.c_int64) for name in ("workspace_bytes", "q_stride", "table_stride", "rows", "heads", "kv_heads", "dim",
                                                      "value_dim", "block_tokens", "window", "causal", "is_bf16")),
                ("scale", ctypes.c_float), ("soft_cap", ctypes.c_float))


class _Heads(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("norm", ctypes.c_void_p), ("stride", ctypes.c_int64), ("count", ctypes.c_int64))


class _Write(ctypes.Structure):
    _fields_ = (("q", _Heads), ("k", _Heads),
                *((name, ctypes.c_void_p) for name in ("v", "table", "positions", "slots", "k_cache", "v_cache")),
                *((name, ctypes.c_int64) for name in ("v_stride", "rows", "dim", "value_dim", "rotary_dim", "block_tokens",
                                                      "is_bf16")),
                ("eps", ctypes.c_float))


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores become weights.

    Args:
        scale: factor on the scores.
        window_tokens: a query sees itself and the ``window_tokens - 1`` tokens before it, and if not causal, as many after it;
            None: all.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``; None leaves them.
        causal: False: every query of a row sees the row's whole context.
    """

    scale: float
    window_tokens: int | None = None
    soft_cap: float | None = None
    causal: bool = True


def visible(query_positions: Tensor, key_positions: Tensor, scores: Scores) -> Tensor:
    """Which keys each query sees, by position: ``[..., Q]``, ``[..., K]`` -> bool ``[..., Q, K]``."""
    query, key = query_positions[..., :, None], key_positions[..., None, :]
    seen = key <= query if scores.causal else torch.ones_like(key <= query)
    if scores.window_tokens is None:
        return seen
    return seen & (key > query - scores.window_tokens) & (key < query + scores.window_tokens)


def paged_attention_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_starts: np.ndarray[Any, Any],
                              context_tokens: np.ndarray[Any, Any], scores: Scores, sinks: Tensor | None = None) -> Tensor:
    """The truth: one sequence and one step at a time, in float32.

    Args:
        q: ``[T, Hq, D]``.
        block_table: ``[R, blocks]``.
        query_starts: ``[R + 1]``, context_tokens ``[R]``: on the host.
        sinks: ``[Hq]`` extra logits, or None.

    Returns:
        ``[T, Hq, Dv]`` float32.
    """
    num_heads, block_tokens = q.shape[1], k_cache.shape[2]
    out = torch.zeros(q.shape[0], num_heads, v_cache.shape[3], device=q.device)
    for r, context in enumerate(context_tokens.tolist()):
        start, stop = int(query_starts[r]), int(query_starts[r + 1])
        blocks = block_table[r, : -(-context // block_tokens)].long()
        keys, values = (c[blocks].transpose(1, 2).flatten(0, 1)[:context].float() for c in (k_cache, v_cache))  # [context, Hk, D]
        before = context - (stop - start)
        seen = visible(torch.arange(before, context, device=q.device), torch.arange(context, device=q.device), scores)  # [Q, context]
        first = 0 if scores.window_tokens is None else max(0, before - scores.window_tokens + 1)  # what fell out may be anybody's
        keys, values, seen = keys[first:], values[first:], seen[:, first:]
        keys, values = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (keys, values))
        logits = torch.einsum("qhd,khd->hqk", q[start:stop].float(), keys) * scores.scale
        if scores.soft_cap is not None:
            logits = scores.soft_cap * torch.tanh(logits / scores.soft_cap)
        logits = logits.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            extra = sinks.float()[:, None, None].expand(-1, stop - start, 1)
            logits = torch.cat((logits, extra), dim=-1)
        weights = logits.softmax(-1)[..., : keys.shape[0]]
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


def cache_shapes(kv_heads: int, dim: int, value_dim: int, block_tokens: int, dtype: torch.dtype) -> tuple[tuple[int, ...], ...]:
    """Shapes of keys and values of one block, as the C++ kernel keeps them."""
    side = side_elements(dtype)
    return (kv_heads, -(-dim // side), block_tokens, side), (kv_heads, -(-block_tokens // side), value_dim, side)


def kernel_caches(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Caches ``[N, Hk, B, D]`` and ``[N, Hk, B, Dv]`` as the C++ kernel keeps them, copied; the padding is 0."""
    side = side_elements(k_cache.dtype)
    (blocks, kv_heads, block_tokens, _), value_dim = k_cache.shape, v_cache.shape[3]
    keys = pad(k_cache, (0, -k_cache.shape[3] % side)).reshape(blocks, kv_heads, block_tokens, -1, side)
    values = pad(v_cache, (0, 0, 0, -block_tokens % side)).reshape(blocks, kv_heads, -1, side, value_dim)
    return keys.transpose(2, 3).contiguous(), values.transpose(3, 4).contiguous()


def side_elements(dtype: torch.dtype) -> int:
    """Elements that the C++ kernel multiplies in one 32-bit lane."""
    return 2 if dtype is torch.bfloat16 else 1


def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_starts: Tensor, context_tokens: Tensor,
                    scores: Scores, block_tokens: int, workspace: Tensor, out: Tensor, sinks: Tensor | None = None) -> Tensor:
    """All rows in one call of the C++ kernel. A query's result does not depend on the other rows.

    Args:
        q: ``[T, Hq, D]`` float32 or bfloat16, as the caches; heads side by side, tokens at any stride.
        k_cache, v_cache: see `cache_shapes`, with a leading block axis.
        block_table, query_starts, context_tokens: int32, see `paged_attention_reference`.
        workspace: `WORKSPACE_BYTES`, zero at first, of nobody else.
        out: ``[T, Hq, Dv]``, filled and returned.
        sinks: ``[Hq]`` float32, or None.
    """
    run("kvloom_attend", _Attend(
        pointer(q), pointer(k_cache), pointer(v_cache), pointer(block_table), pointer(query_starts), pointer(context_tokens),
        pointer(sinks), pointer(out), pointer(workspace), workspace.numel(), q.stride(0), block_table.stride(0), block_table.shape[0],
        q.shape[1], k_cache.shape[1], q.shape[2], v_cache.shape[3], block_tokens, scores.window_tokens or 0, scores.causal,
        q.dtype is torch.bfloat16, scores.scale, scores.soft_cap or 0.0), on_ranges=True)
    return out


def paged_write_reference(new: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Store ``new [T, Hk, D]`` at ``slots [T]`` of ``cache [N, Hk, B, D]``."""
    block_tokens = cache.shape[2]
    cache[slots // block_tokens, :, slots % block_tokens] = new


def norm_rope_write_reference(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
                              rotation: tuple[Tensor, Tensor] | None = None, norms: tuple[Tensor, Tensor] | None = None,
                              eps: float = 0.0) -> None:
    """See `norm_rope_write`; caches are ``[N, Hk, B, D]`` and ``[N, Hk, B, Dv]``."""
    for heads, norm in zip((q, k), norms or (None, None), strict=True):
        if norm is not None:
            heads.copy_(rms_norm_reference(heads, norm, eps))
        if rotation is not None:
            table, positions = rotation
            cosines, sines = table[positions][:, None].chunk(2, dim=-1)  # [T, 1, Dr / 2]
            turned = heads[..., :table.shape[1]]
            first, second = turned.float().chunk(2, dim=-1)
            turned.copy_(torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1))
    paged_write_reference(k, k_cache, slots)
    paged_write_reference(v, v_cache, slots)


def norm_rope_write(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, block_tokens: int,
                    rotation: tuple[Tensor, Tensor] | None = None, norms: tuple[Tensor, Tensor] | None = None,
                    eps: float = 0.0) -> None:
    """Per-head norms, rotation in place on q and k, and writing k and v to their slots, in one call of the C++ kernel.

    Args:
        q, k, v: ``[T, heads, D]`` each, heads side by side, tokens at any stride.
        k_cache, v_cache: see `cache_shapes`.
        slots: ``[T]`` int64.
        rotation: table ``[max_model_len, Dr]`` float32 and positions ``[T]`` int64, see `kvloom.layers.Rotation`; None: no rotation.
        norms: ``[D]`` weights for q and k; None: no norms.
    """
    table, positions = (slots, slots) if rotation is None else rotation
    q_norm, k_norm = norms or (None, None)
    run("kvloom_norm_rope_write", _Write(
        _Heads(pointer(q), pointer(q_norm), q.stride(0), q.shape[1]), _Heads(pointer(k), pointer(k_norm), k.stride(0), k.shape[1]),
        pointer(v), pointer(table), pointer(positions), pointer(slots), pointer(k_cache), pointer(v_cache), v.stride(0), q.shape[0],
        q.shape[2], v.shape[2], 0 if rotation is None else table.shape[1], block_tokens, q.dtype is torch.bfloat16, eps))


def paged_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """One query token a row, all rows in one call: ``q [R, Hq, D] -> [R, Hq, Dv]``.

    Args:
        block_table: ``[R, blocks]``, the columns that any row reads.
        mask: bool ``[R, 1, 1, blocks * B]``, see `decode_mask`.
    """
    rows, heads = q.shape[0], q.shape[1]
    keys, values = (_gather(c, block_table, mask) for c in (k_cache, v_cache))  # [R, Hk, K, D]
    grouped = q.view(rows, keys.shape[1], heads // keys.shape[1], q.shape[2])
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scores.scale)
    return out.reshape(rows, heads, -1)


def decode_mask(context_tokens: Tensor, columns: int, block_tokens: int, scores: Scores) -> Tensor:
    """Which slots of a row's first `columns` blocks its last token sees: bool ``[R, 1, 1, columns * block_tokens]``."""
    positions = torch.arange(columns * block_tokens, device=context_tokens.device)
    seen = visible((context_tokens - 1)[:, None], positions[None], scores) & (positions < context_tokens[:, None])[:, None]
    return seen[:, None]


def _gather(cache: Tensor, block_table: Tensor, mask: Tensor) -> Tensor:
    """``[R, Hk, blocks * B, D]``; what is masked becomes 0."""
    blocks = cache.index_select(0, block_table.flatten().long())
    rows = blocks.view(*block_table.shape, *cache.shape[1:]).transpose(1, 2).flatten(2, 3)
    return torch.where(mask.transpose(-1, -2), rows, torch.zeros_like(rows))
