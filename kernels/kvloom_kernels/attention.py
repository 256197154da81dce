"""Attention over a paged KV cache: the plain reference, and a batched torch version for rows of one query token.

Caches are ``k [N, Hk, B, D]`` and ``v [N, Hk, B, Dv]``: N blocks of B tokens. Block-table entries outside a row's context or
window may name blocks of others; they are masked after they are read and their values are cleared, so not even NaN gets through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores become weights.

    Args:
        scale: factor on the scores.
        window_tokens: a query sees itself and the ``window_tokens - 1`` tokens before it; None: all.
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
    return seen if scores.window_tokens is None else seen & (key > query - scores.window_tokens)


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
    out = torch.zeros(q.shape[0], num_heads, v_cache.shape[3])
    for r, context in enumerate(context_tokens.tolist()):
        start, stop = int(query_starts[r]), int(query_starts[r + 1])
        blocks = block_table[r, : -(-context // block_tokens)].long()
        keys, values = (c[blocks].transpose(1, 2).flatten(0, 1)[:context].float() for c in (k_cache, v_cache))  # [context, Hk, D]
        positions = torch.arange(context - (stop - start), context)
        seen = visible(positions, torch.arange(context), scores)  # [Q, context]
        first = int(seen.any(0).int().argmax())  # what fell out of the window may be anybody's
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


def paged_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_tokens: Tensor, mask: Tensor,
                 scores: Scores) -> Tensor:
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
    return visible((context_tokens - 1)[:, None], positions[None], scores)[:, None]


def _gather(cache: Tensor, block_table: Tensor, mask: Tensor) -> Tensor:
    """``[R, Hk, blocks * B, D]``; what is masked becomes 0."""
    blocks = cache.index_select(0, block_table.flatten().long())
    rows = blocks.unflatten(0, block_table.shape).transpose(1, 2).flatten(2, 3)
    return rows.masked_fill(~mask.transpose(-1, -2), 0)
