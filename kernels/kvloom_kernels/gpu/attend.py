"""The Triton kernels of paged attention: one for any mix of prompts, chunks and decodes, one that joins its splits, two that write."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def attend_kernel(q: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, tables: tl.tensor, query_starts: tl.tensor,
                  contexts: tl.tensor, out: tl.tensor, tops: tl.tensor, sums: tl.tensor, q_stride: tl.tensor, table_stride: tl.tensor,
                  scale: tl.tensor, soft_cap: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor, tokens: tl.tensor, splits: tl.tensor,
                  DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_TOKENS: tl.constexpr, WINDOW: tl.constexpr,
                  CAUSAL: tl.constexpr, CAPPED: tl.constexpr, QUERIES: tl.constexpr, GROUP_PAD: tl.constexpr, KEYS: tl.constexpr,
                  DIM_PAD: tl.constexpr, VALUE_PAD: tl.constexpr, WIDE: tl.constexpr) -> None:
    """One program: QUERIES tokens of one row, all query heads of one kv head, one split of what they see.

    Grid ``(rows, tiles of the longest row, kv_heads * splits)``. Writes ``out [splits, T, Hq, Dv]``, normalised over the split, with
    the split's greatest score and sum of weights in ``tops`` and ``sums`` ``[splits, T, Hq]``, float32. WINDOW 0: none. WIDE: products
    take float32, since triton's interpreter multiplies bfloat16 as integers; numbers are rounded as without.
    """
    row = tl.program_id(0)
    first_query = tl.program_id(1) * QUERIES
    kv_head = tl.program_id(2) % kv_heads
    split = tl.program_id(2) // kv_heads
    begin = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - begin
    if first_query >= count:
        return
    context = tl.load(contexts + row)
    before = context - count

    lane = tl.arange(0, QUERIES * GROUP_PAD)
    query = first_query + lane // GROUP_PAD
    member = lane % GROUP_PAD
    real = (query < count) & (member < GROUP)
    token = (begin + query).to(tl.int64)
    head = kv_head * GROUP + member
    position = before + query
    dims = tl.arange(0, DIM_PAD)
    value_dims = tl.arange(0, VALUE_PAD)
    queries = tl.load(q + token[:, None] * q_stride + head[:, None] * DIM + dims[None, :],
                      mask=real[:, None] & (dims[None, :] < DIM), other=0.0)

    if WIDE:
        queries = queries.to(tl.float32)

    # What any query of this tile sees: nothing outside of it is read, it may be anybody's.
    last_query = tl.minimum(first_query + QUERIES, count) - 1
    low = 0
    high = context
    if CAUSAL:
        high = before + last_query + 1
    if WINDOW:
        low = tl.maximum(0, before + first_query - WINDOW + 1)
        high = tl.minimum(high, before + last_query + WINDOW)
    share = tl.cdiv(tl.cdiv(high - low, splits), KEYS) * KEYS
    start = low + split * share
    stop = tl.minimum(high, start + share)

    top = tl.full([QUERIES * GROUP_PAD], -1e30, tl.float32)
    total = tl.zeros([QUERIES * GROUP_PAD], tl.float32)
    acc = tl.zeros([QUERIES * GROUP_PAD, VALUE_PAD], tl.float32)
    for at in range(start, stop, KEYS):
        key = at + tl.arange(0, KEYS)
        there = key < stop
        block = tl.load(tables + row * table_stride + key // BLOCK_TOKENS, mask=there, other=0).to(tl.int64)
        place = (block * kv_heads + kv_head) * BLOCK_TOKENS + key % BLOCK_TOKENS
        keys = tl.load(k_cache + place[None, :] * DIM + dims[:, None], mask=there[None, :] & (dims[:, None] < DIM), other=0.0)
        if WIDE:
            keys = keys.to(tl.float32)
        scores = tl.dot(queries, keys, input_precision="ieee") * scale
        if CAPPED:
            scores = soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)  # tanh
        seen = there[None, :] & real[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= position[:, None])
        if WINDOW:
            seen = seen & (key[None, :] > position[:, None] - WINDOW) & (key[None, :] < position[:, None] + WINDOW)
        scores = tl.where(seen, scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp(scores - new_top[:, None]), 0.0)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v_cache + place[:, None] * VALUE_DIM + value_dims[None, :],
                         mask=there[:, None] & (value_dims[None, :] < VALUE_DIM), other=0.0)
        weights = weights.to(values.dtype)
        if WIDE:
            weights = weights.to(tl.float32)
            values = values.to(tl.float32)
        acc = acc * shrink[:, None] + tl.dot(weights, values, input_precision="ieee")
        top = new_top

    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    entry = (split * tokens + token) * heads + head
    tl.store(out + entry[:, None] * VALUE_DIM + value_dims[None, :], result.to(out.dtype.element_ty),
             mask=real[:, None] & (value_dims[None, :] < VALUE_DIM))
    tl.store(tops + entry, top, mask=real)
    tl.store(sums + entry, total, mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def join_kernel(parts: tl.tensor, tops: tl.tensor, sums: tl.tensor, out: tl.tensor, rows: tl.tensor, splits: tl.tensor,
                VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr) -> None:
    """One program a token and head: the splits' results, each by its share of the weights. Grid ``(T * Hq,)``; ``rows`` is T * Hq."""
    entry = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, VALUE_PAD)
    top = tl.load(tops + entry)
    for s in range(1, splits):
        top = tl.maximum(top, tl.load(tops + s * rows + entry))
    acc = tl.zeros([VALUE_PAD], tl.float32)
    total = 0.0
    for s in range(0, splits):
        weight = tl.load(sums + s * rows + entry) * tl.exp(tl.load(tops + s * rows + entry) - top)
        acc += weight * tl.load(parts + (s * rows + entry) * VALUE_DIM + dims, mask=dims < VALUE_DIM, other=0.0)
        total += weight
    tl.store(out + entry * VALUE_DIM + dims, (acc / total).to(out.dtype.element_ty), mask=dims < VALUE_DIM)


@triton.jit  # type: ignore[untyped-decorator]
def write_kernel(new: tl.tensor, cache: tl.tensor, slots: tl.tensor, stride: tl.tensor, kv_heads: tl.tensor, DIM: tl.constexpr,
                 BLOCK_TOKENS: tl.constexpr, DIM_PAD: tl.constexpr) -> None:
    """One token's head to its slot. Grid ``(T, kv_heads)``; ``new [T, Hk, D]``, ``cache [N, Hk, B, D]``."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + token)
    dims = tl.arange(0, DIM_PAD)
    place = ((slot // BLOCK_TOKENS) * kv_heads + head) * BLOCK_TOKENS + slot % BLOCK_TOKENS
    tl.store(cache + place * DIM + dims, tl.load(new + token * stride + head * DIM + dims, mask=dims < DIM), mask=dims < DIM)


@triton.jit  # type: ignore[untyped-decorator]
def _square_sum(x: tl.tensor) -> tl.tensor:
    return tl.sum(x * x, 0)


@triton.jit  # type: ignore[untyped-decorator]
def norm_rope_write_kernel(q: tl.tensor, k: tl.tensor, v: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, slots: tl.tensor,
                           table: tl.tensor, positions: tl.tensor, q_norm: tl.tensor, k_norm: tl.tensor, q_stride: tl.tensor,
                           k_stride: tl.tensor, v_stride: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor, eps: tl.tensor,
                           DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
                           NORMED: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, VALUE_PAD: tl.constexpr) -> None:
    """One token's head of q or k: norm, rotation of the first 2 * HALF elements in pairs (i, i + HALF), in place; a head of k also goes
    to its slot, with that of v. Grid ``(T, heads + kv_heads)``. In float32, rounded after the norm as if that were a step of its own.
    Each thread reads what it writes, so that none overtakes another.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    is_key = head >= heads
    at = q + token * q_stride + head * DIM
    weight = q_norm
    if is_key:
        at = k + token * k_stride + (head - heads) * DIM
        weight = k_norm
    half = tl.arange(0, HALF_PAD)
    in_half = half < HALF
    rest = 2 * HALF + tl.arange(0, REST_PAD)
    in_rest = rest < DIM
    first = tl.load(at + half, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(at + HALF + half, mask=in_half, other=0.0).to(tl.float32)
    left = tl.load(at + rest, mask=in_rest, other=0.0).to(tl.float32)
    kind = q.dtype.element_ty
    if NORMED:
        scale = tl.rsqrt((_square_sum(first) + _square_sum(second) + _square_sum(left)) / DIM + eps)
        first = (first * scale).to(kind).to(tl.float32) * tl.load(weight + half, mask=in_half, other=0.0).to(tl.float32)
        second = (second * scale).to(kind).to(tl.float32) * tl.load(weight + HALF + half, mask=in_half, other=0.0).to(tl.float32)
        left = (left * scale).to(kind).to(tl.float32) * tl.load(weight + rest, mask=in_rest, other=0.0).to(tl.float32)
        first = first.to(kind).to(tl.float32)
        second = second.to(kind).to(tl.float32)
    angle = table + tl.load(positions + token) * (2 * HALF)
    cos = tl.load(angle + half, mask=in_half, other=0.0)
    sin = tl.load(angle + HALF + half, mask=in_half, other=0.0)
    turned_first = (first * cos - second * sin).to(kind)
    turned_second = (second * cos + first * sin).to(kind)
    tl.store(at + half, turned_first, mask=in_half)
    tl.store(at + HALF + half, turned_second, mask=in_half)
    tl.store(at + rest, left.to(kind), mask=in_rest)
    if is_key:
        slot = tl.load(slots + token)
        place = ((slot // BLOCK_TOKENS) * kv_heads + head - heads) * BLOCK_TOKENS + slot % BLOCK_TOKENS
        kept = k_cache + place * DIM
        tl.store(kept + half, turned_first, mask=in_half)
        tl.store(kept + HALF + half, turned_second, mask=in_half)
        tl.store(kept + rest, left.to(kind), mask=in_rest)
        dims = tl.arange(0, VALUE_PAD)
        value = tl.load(v + token * v_stride + (head - heads) * VALUE_DIM + dims, mask=dims < VALUE_DIM)
        tl.store(v_cache + place * VALUE_DIM + dims, value, mask=dims < VALUE_DIM)
