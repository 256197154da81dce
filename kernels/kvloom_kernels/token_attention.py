"""Attention over a step's own keys and values, nothing stored: the plain reference, a C++ kernel, and torch's own, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvloom_kernels.attention import Scores, visible
from kvloom_kernels.call import pointer
from kvloom_kernels.plan import unrecorded


def token_attention_reference(q: Tensor, k: Tensor, v: Tensor, query_starts: np.ndarray[Any, Any], scores: Scores) -> Tensor:
    """The truth: one row at a time, in float32.

    Args:
        q, k, v: ``[T, Hq, D]``, ``[T, Hk, D]``, ``[T, Hk, Dv]``.
        query_starts: ``[R + 1]`` on the host; tokens of a row see those of their own row only.

    Returns:
        ``[T, Hq, Dv]`` float32.
    """
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], device=q.device)
    for part in _rows(query_starts):
        keys, values = (x[part].float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q[part].float(), keys) * scores.scale
        if scores.soft_cap is not None:
            logits = scores.soft_cap * torch.tanh(logits / scores.soft_cap)
        places = torch.arange(keys.shape[0], device=q.device)
        weights = logits.masked_fill(~visible(places, places, scores), -torch.inf).softmax(-1)
        out[part] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


def token_attention(q: Tensor, k: Tensor, v: Tensor, query_starts: Tensor, scores: Scores, out: Tensor) -> Tensor:
    """All rows in one call of the C++ kernel, in float32 inside.

    Args:
        q, k, v: ``[T, heads, D]`` each, float32 or bfloat16; heads side by side, tokens at any stride.
        query_starts: ``[R + 1]`` int32.
        out: ``[T, Hq, Dv]`` contiguous, filled and returned.
    """
    unrecorded("kvloom_attend_tokens")(
        pointer(q), q.stride(0), pointer(k), k.stride(0), pointer(v), v.stride(0), pointer(query_starts), query_starts.shape[0] - 1,
        q.shape[1], k.shape[1], q.shape[2], v.shape[2], scores.window_tokens or 0, scores.scale, scores.soft_cap or 0.0, scores.causal,
        pointer(out), q.dtype is torch.bfloat16, torch.get_num_threads())
    return out


def token_attention_torch(q: Tensor, k: Tensor, v: Tensor, query_starts: np.ndarray[Any, Any], scores: Scores, out: Tensor) -> Tensor:
    """Row by row through torch's kernel, on any device; no soft cap. Arguments as `token_attention_reference`; fills `out`."""
    for part in _rows(query_starts):
        places = torch.arange(part.stop - part.start, device=q.device)
        seen = None if scores.window_tokens is None and not scores.causal else visible(places, places, scores)
        queries, keys, values = (x[part].transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, tokens, D]
        found = scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=scores.scale, enable_gqa=True)
        out[part] = found[0].transpose(0, 1)
    return out


def _rows(query_starts: np.ndarray[Any, Any]) -> Iterator[slice]:
    starts = query_starts.tolist()
    return map(slice, starts[:-1], starts[1:])
