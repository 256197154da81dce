"""What `scripts/bench_kernels` measures: calls of each C++ kernel beside calls of torch that give the same.

torch's side is the kernel's reference where somebody would run it; where that is slow on purpose (attention one row at a time, sorting
a vocabulary), it is what a program without our kernel would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear as linear_reference
from torch.nn.functional import scaled_dot_product_attention

from kvloom_kernels.activation import Finish, gated_mul, gated_mul_reference
from kvloom_kernels.attention import (
    WORKSPACE_BYTES,
    Scores,
    kernel_caches,
    norm_rope_write,
    norm_rope_write_reference,
    paged_attention,
)
from kvloom_kernels.bitmask import WORD_BITS, apply_bitmask, apply_bitmask_reference
from kvloom_kernels.blocks import copy_blocks, copy_blocks_reference, touch, touch_reference
from kvloom_kernels.gather import Places, Ranges, gather_blocks, gather_blocks_reference, gather_tokens, gather_tokens_reference
from kvloom_kernels.linear import WeightShape, lookup, lookup_reference, pack, pack_reference, panel_features, product
from kvloom_kernels.norm import rms_norm, rms_norm_add, rms_norm_reference
from kvloom_kernels.sampling import (
    best,
    best_reference,
    divide,
    divide_reference,
    draw,
    draw_reference,
    token_logprobs,
    top_p,
    top_p_reference,
)
from kvloom_kernels.token_attention import token_attention, token_attention_torch

EPS = 1e-5


class Case(NamedTuple):
    """One line: what it is, our call and torch's. What both give is the same within the dtype's rounding."""

    name: str
    ours: Callable[[], Any]
    torchs: Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """Of the model whose kernels are called, SmolLM2-135M's, and of what is asked of it.

    Attributes:
        weights_bytes: more than any cache: a model's weights are cold when their layer comes round again.
        rows: of products.
        paged: rows, tokens of each row, context.
        sentences: lengths of an encoder's sentences; a step of 256 sentences of mixed length has about these.
    """

    hidden: int = 576
    inner: int = 1536
    vocabulary: int = 49152
    heads: int = 9
    kv_heads: int = 3
    dim: int = 64
    block_tokens: int = 16
    weights_bytes: int = 300 * 2**20
    rows: tuple[int, ...] = (1, 4, 16, 64, 256, 2048)
    step_rows: tuple[int, ...] = (64, 2048)
    paged: tuple[tuple[int, int, int], ...] = ((1, 1, 4096), (64, 1, 512), (8, 256, 256), (1, 2048, 2048))
    sentences: tuple[int, ...] = tuple(range(5, 200, 10))
    long_sentence: int = 2048
    requests: int = 64
    num_blocks: int = 4096


SMALL = Sizes(hidden=48, inner=80, vocabulary=1000, heads=6, kv_heads=2, dim=16, weights_bytes=2**16, rows=(1, 65), step_rows=(3,),
              paged=((1, 1, 64), (3, 32, 32)), sentences=(5, 16, 33), long_sentence=70, requests=5, num_blocks=128)
"""For a look at whether every line runs."""


def random(*shape: int) -> Tensor:
    """bfloat16."""
    return torch.randn(shape).bfloat16()


def after(_: None, changed: Any) -> Any:
    """What a call that gives nothing has changed."""
    return changed


def products(s: Sizes) -> Iterator[Case]:
    """Cold weights of one shape, one after the other, as a model's layers are."""
    for out, inner in ((2 * s.inner, s.hidden), (s.hidden, s.inner)):
        weights, shape = [random(out, inner) for _ in range(s.weights_bytes // (2 * out * inner))], WeightShape(out, inner)
        packed = [pack(w.clone()) for w in weights]
        for rows in s.rows:
            x, few = random(rows, inner), len(weights) if rows <= 64 else 8
            yield Case(f"product {out} x {inner}, {rows} rows, {len(weights[:few])} layers",
                       lambda a=(x, packed[:few], shape): [product(a[0], w, a[2]) for w in a[1]],
                       lambda a=(x, weights[:few]): [linear_reference(a[0], w) for w in a[1]])
    head, head_shape = random(s.vocabulary, s.hidden), WeightShape(s.vocabulary, s.hidden)
    packed_head = pack(head.clone())
    for rows in (1, 64):
        x = random(rows, s.hidden)
        yield Case(f"product {s.vocabulary} x {s.hidden}, {rows} rows", lambda x=x: product(x, packed_head, head_shape),
                   lambda x=x: linear_reference(x, head))
    gate_up, gated_shape = random(2 * s.inner, s.hidden), WeightShape(2 * s.inner, s.hidden)
    packed_gate_up = pack(gate_up.clone())
    for rows in (1, 64):
        x = random(rows, s.hidden)
        yield Case(f"gated product {2 * s.inner} x {s.hidden}, {rows} rows",
                   lambda x=x: product(x, packed_gate_up, gated_shape, None, Finish.SILU),
                   lambda x=x: gated_mul_reference(linear_reference(x, gate_up), Finish.SILU))


def packing(s: Sizes) -> Iterator[Case]:
    """While weights are loaded; where they are."""
    weight = random(2 * s.inner, s.hidden)
    own = weight.clone()
    yield Case(f"packing {2 * s.inner} x {s.hidden}, with a copy of the weight", lambda: pack(own.copy_(weight)),
               lambda: pack_reference(weight, panel_features()))


def lookups(s: Sizes) -> Iterator[Case]:
    """Embeddings, from a packed weight too."""
    table, shape = random(s.vocabulary, s.hidden), WeightShape(s.vocabulary, s.hidden)
    packed = pack(table.clone())
    for rows in s.step_rows:
        ids = torch.randint(0, s.vocabulary, (rows,))
        yield Case(f"lookup, {rows} rows of {s.hidden}", lambda ids=ids: lookup(ids, table),
                   lambda ids=ids: lookup_reference(ids, table))
        yield Case(f"lookup in a packed weight, {rows} rows of {s.hidden}", lambda ids=ids: lookup(ids, packed, shape),
                   lambda ids=ids: lookup_reference(ids, table))


def attention(s: Sizes) -> Iterator[Case]:
    """Paged attention beside torch's over tensors that need no gathering: what paging costs."""
    for rows, query_tokens, context in s.paged:
        columns = context // s.block_tokens
        k, v = (random(rows * columns + 1, s.kv_heads, s.block_tokens, s.dim) for _ in range(2))
        q = random(rows * query_tokens, s.heads, s.dim)
        table = (torch.randperm(rows * columns) + 1).view(rows, columns).int()
        plain_k, plain_v = (c[table.long()].transpose(1, 2).flatten(2, 3).contiguous() for c in (k, v))  # [rows, Hk, context, D]
        causal, shape = query_tokens > 1, (rows, query_tokens, s.heads, s.dim)
        plain = (q.view(shape).transpose(1, 2).contiguous(), plain_k, plain_v)
        starts, contexts = (torch.arange(rows + 1) * query_tokens).int(), torch.full((rows,), context, dtype=torch.int32)
        workspace, out = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8), torch.empty_like(q)
        ours = (q, *kernel_caches(k, v), table, starts, contexts, Scores(s.dim**-0.5), s.block_tokens, workspace, out)
        yield Case(f"attention, {rows} rows of {query_tokens} tokens, context {context}",
                   lambda a=ours, shape=shape: paged_attention(*a).view(shape).transpose(1, 2),
                   lambda a=plain, causal=causal: scaled_dot_product_attention(*a, is_causal=causal, enable_gqa=True))


def token_attentions(s: Sizes) -> Iterator[Case]:
    """Sentences of an encoder's step side by side, beside torch's attention sentence by sentence."""
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, window in ((s.sentences, None), ((s.long_sentence,), None), ((s.long_sentence,), 65)):
            q, k, v = torch.randn(sum(tokens), 3, 12, 32).to(dtype).unbind(1)
            starts, (out, other) = torch.tensor([0, *tokens]).cumsum(0).int(), torch.empty(2, *q.shape, dtype=dtype)
            scores, on_host = Scores(32**-0.5, window, causal=False), starts.numpy()
            what = f"{len(tokens)} x {sum(tokens) // len(tokens)} tokens" + (f", window {window}" if window else "")
            yield Case(f"encoder attention, {what}, {str(dtype)[6:]}", lambda a=(q, k, v, starts, scores, out): token_attention(*a),
                       lambda a=(q, k, v, on_host, scores, other): token_attention_torch(*a))


def norms(s: Sizes) -> Iterator[Case]:
    """Alone and with the addition to the residual stream."""
    for rows in s.step_rows:
        x, residual, weight = random(rows, s.hidden), random(rows, s.hidden), random(s.hidden)
        yield Case(f"norm, {rows} rows", lambda a=(x, weight): rms_norm(*a, EPS), lambda a=(x, weight): rms_norm_reference(*a, EPS))
        yield Case(f"norm and residual, {rows} rows", lambda a=(x, residual, weight): rms_norm_add(*a, EPS)[0],
                   lambda a=(x, residual, weight): rms_norm_reference(a[0] + a[1], a[2], EPS))


def activations(s: Sizes) -> Iterator[Case]:
    """Gated ones."""
    for rows in s.step_rows:
        gate_up = random(rows, 2 * s.inner)
        for finish in (Finish.SILU, Finish.GELU_TANH):
            yield Case(f"gated activation {finish.name.lower()}, {rows} rows", lambda a=(gate_up, finish): gated_mul(*a),
                       lambda a=(gate_up, finish): gated_mul_reference(*a))


def cache_writes(s: Sizes) -> Iterator[Case]:
    """Rotation and writing of a step's keys and values; with norms of heads, as Qwen3 has them."""
    for rows in s.step_rows:
        caches = [torch.zeros(s.num_blocks, s.kv_heads, s.block_tokens, s.dim, dtype=torch.bfloat16) for _ in range(2)]
        slots = torch.randperm(s.num_blocks * s.block_tokens)[:rows]
        angles = torch.rand(rows, s.dim // 2)
        rotation = (torch.cat((angles.cos(), angles.sin()), dim=1), torch.arange(rows))
        for norm in (None, (random(s.dim), random(s.dim))):
            heads = [random(rows, n, s.dim) for n in (s.heads, s.kv_heads, s.kv_heads)]
            ours = (*(h.clone() for h in heads), *kernel_caches(*caches), slots, s.block_tokens, rotation, norm, EPS)
            theirs = (*heads, *caches, slots, rotation, norm, EPS)
            yield Case(f"{'norm, ' if norm else ''}rotation and cache write, {rows} rows",
                       lambda a=ours: after(norm_rope_write(*a), a[:2]), lambda a=theirs: after(norm_rope_write_reference(*a), a[:2]))


def block_copies(s: Sizes) -> Iterator[Case]:
    """Of 30 layers' keys and values, as a sequence that forks needs them."""
    caches, other = ([torch.ones(s.num_blocks // 8, s.kv_heads, s.block_tokens, s.dim, dtype=torch.bfloat16) for _ in range(60)]
                     for _ in range(2))
    pairs = [(i, i + s.num_blocks // 16) for i in range(4)]
    yield Case("copies of 4 blocks in 60 tensors", lambda: after(copy_blocks(caches, pairs), caches),
               lambda: after(copy_blocks_reference(other, pairs), other))


def first_uses(s: Sizes) -> Iterator[Case]:
    """Of memory that is there already: what is left is the walk over its pages."""
    pieces, other = ([torch.zeros(s.num_blocks * 4096, dtype=torch.uint8) for _ in range(4)] for _ in range(2))
    yield Case(f"a zero in each of {4 * s.num_blocks} pages", lambda: after(touch(pieces), pieces),
               lambda: after(touch_reference(other), other))


def bitmasks(s: Sizes) -> Iterator[Case]:
    """Of every request, with half the tokens allowed."""
    logits = random(s.requests, s.vocabulary)
    masks, rows = torch.randint(-2**31, 2**31, (s.requests, -(-s.vocabulary // WORD_BITS))).int(), torch.arange(s.requests)
    own, other = logits.clone(), logits.clone()
    yield Case(f"bitmasks, {s.requests} rows of {s.vocabulary}", lambda: after(apply_bitmask(own, masks, rows), own),
               lambda: after(apply_bitmask_reference(other, masks, rows), other))


def gathered(s: Sizes, rows: int, query_tokens: int, context: int) -> tuple[Tensor, Ranges, Places]:
    """A table by position, the ranges of a step, and where its tokens are."""
    starts = torch.arange(rows + 1, dtype=torch.int32) * query_tokens
    ranges = Ranges(torch.randperm(rows).int(), starts, torch.full((rows,), context, dtype=torch.int32))
    kept = torch.randint(0, s.num_blocks, (rows, context), dtype=torch.int32)
    positions = torch.arange(context - query_tokens, context).repeat(rows)
    return kept, ranges, Places(ranges.rows.long().repeat_interleave(query_tokens), positions)


def token_gathers(s: Sizes) -> Iterator[Case]:
    """Token ids, rows and positions of a step."""
    for rows, query_tokens, context in s.paged:
        kept, ranges, places = gathered(s, rows, query_tokens, context)
        ours, theirs = ((torch.zeros_like(places.rows), Places(*map(torch.zeros_like, places))) for _ in range(2))
        yield Case(f"gathering tokens, {rows} rows of {query_tokens} tokens, context {context}",
                   lambda a=(kept, ranges), out=ours: after(gather_tokens(*a, *out), (out[0], *out[1])),
                   lambda a=(kept, ranges), out=theirs: after(gather_tokens_reference(*a, *out), (out[0], *out[1])))


def block_gathers(s: Sizes) -> Iterator[Case]:
    """Block tables and slots of a step."""
    for rows, query_tokens, context in s.paged:
        kept, ranges, places = gathered(s, rows, query_tokens, context)
        tables = kept[:, :context // s.block_tokens].contiguous()
        ours, theirs = ((torch.zeros_like(tables), torch.zeros_like(places.rows)) for _ in range(2))
        yield Case(f"gathering blocks, {rows} rows of {query_tokens} tokens, context {context}",
                   lambda a=(tables, ranges, places, s.block_tokens), out=ours: after(gather_blocks(*a, *out), out),
                   lambda a=(tables, ranges, places, s.block_tokens), out=theirs: after(gather_blocks_reference(*a, *out), out))


def divisions(s: Sizes) -> Iterator[Case]:
    """Temperatures, in place: by 1, so that repeated calls do not change the logits."""
    logits, by = torch.randn(s.requests, s.vocabulary), torch.ones(s.requests)
    yield Case(f"temperatures, {s.requests} rows of {s.vocabulary}", lambda: divide(logits, by), lambda: divide_reference(logits, by))


def top_ps(s: Sizes) -> Iterator[Case]:
    """In place, so each call has a copy of the logits first."""
    logits, p = 3 * torch.randn(s.requests, s.vocabulary), torch.full((s.requests,), 0.9)
    own, other = logits.clone(), logits.clone()
    yield Case(f"top-p with a copy, {s.requests} rows of {s.vocabulary}", lambda: top_p(own.copy_(logits), p),
               lambda: top_p_reference(other.copy_(logits), p))


def bests(s: Sizes) -> Iterator[Case]:
    """Greedy tokens."""
    logits = torch.randn(s.requests, s.vocabulary)
    yield Case(f"best token, {s.requests} rows of {s.vocabulary}", lambda: best(logits), lambda: best_reference(logits))


def draws(s: Sizes) -> Iterator[Case]:
    """One token a row."""
    logits = 3 * torch.randn(s.requests, s.vocabulary)
    value, uniform = logits.amax(-1), torch.rand(s.requests, dtype=torch.float64)
    yield Case(f"draw, {s.requests} rows of {s.vocabulary}", lambda: draw(logits, value, uniform),
               lambda: draw_reference(logits, value, uniform))


def our_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Without the best tokens' ids: among equal ones torch chooses as it likes."""
    found = token_logprobs(logits, token_ids, k)
    return found.logprobs, found.ranks[:, 0]


def torch_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `token_logprobs` and the chosen tokens' ranks: its reference sorts, which nobody would do."""
    chosen = token_ids[:, None]
    logprobs = logits.float().log_softmax(-1)
    ranks = (logits > logits.gather(1, chosen)).sum(-1) + 1
    return torch.cat((logprobs.gather(1, chosen), logprobs.topk(k, dim=-1).values), dim=1), ranks


def logprobs(s: Sizes) -> Iterator[Case]:
    """Of the chosen token and the k best ones."""
    logits, token_ids = 3 * random(s.requests, s.vocabulary), torch.randint(0, s.vocabulary, (s.requests,))
    for k in (0, 5, 20):
        yield Case(f"log-probabilities, {s.requests} rows of {s.vocabulary}, k {k}",
                   lambda a=(logits, token_ids, k): our_logprobs(*a),
                   lambda a=(logits, token_ids, k): torch_logprobs(*a))


CASES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "kvloom_product": products,
    "kvloom_pack": packing,
    "kvloom_lookup": lookups,
    "kvloom_attend": attention,
    "kvloom_attend_tokens": token_attentions,
    "kvloom_rms_norm": norms,
    "kvloom_gated_mul": activations,
    "kvloom_norm_rope_write": cache_writes,
    "kvloom_copy_blocks": block_copies,
    "kvloom_touch": first_uses,
    "kvloom_apply_bitmask": bitmasks,
    "kvloom_gather_tokens": token_gathers,
    "kvloom_gather_blocks": block_gathers,
    "kvloom_divide": divisions,
    "kvloom_top_p": top_ps,
    "kvloom_best": bests,
    "kvloom_draw": draws,
    "kvloom_token_logprobs": logprobs,
}
"""Lines of each kernel, by the name that the library exports."""
