"""The CUDA backend: our Triton kernels, all rows of a step in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvloom.errors import InternalError
from kvloom.interfaces import AttentionBatch, AttentionSpec, LayerCache
from kvloom_kernels.gpu.attention import paged_attention_gpu, paged_write, split_count
from kvloom_plugins.attention.paged import PagedAttention


@dataclass(slots=True)
class TritonMeta:
    """A step's rows, and among how many programs each context is divided."""

    batch: AttentionBatch
    splits: int


class TritonAttention(PagedAttention):
    """Keys and values in blocks, head by head; see `paged_attention_gpu`."""

    graph_support = True

    @classmethod
    def supports(cls, spec: AttentionSpec) -> str | None:
        """See `AttentionBackend.supports`."""
        if not spec.stored:
            return "it reads a cache, and nothing is stored"
        if spec.sinks:
            return "it has no sinks"
        return super().supports(spec)

    def prepare(self, batch: AttentionBatch, out: Any = None) -> Any:
        """See `AttentionBackend.prepare`. With `out`, rows and tokens that the batch lacks are empty: their results are arbitrary."""
        if out is None:
            return TritonMeta(batch, split_count(len(batch.context_tokens_host) * self.spec.num_kv_heads, batch.max_context_tokens))
        kept = out.batch
        for new, old in ((batch.block_table, kept.block_table), (batch.slots, kept.slots), (batch.context_tokens, kept.context_tokens)):
            if any(n > o for n, o in zip(new.shape, old.shape, strict=True)):
                raise InternalError(f"a batch with {tuple(new.shape)} does not fit into buffers of {tuple(old.shape)}")
        if batch.max_query_tokens > kept.max_query_tokens:
            raise InternalError(f"{batch.max_query_tokens} tokens a row do not fit into a launch for {kept.max_query_tokens}")
        rows, tokens = batch.context_tokens.shape[0], batch.slots.shape[0]
        kept.query_starts[:rows + 1].copy_(batch.query_starts)
        kept.query_starts[rows + 1:].fill_(tokens)
        kept.context_tokens[:rows].copy_(batch.context_tokens)
        kept.context_tokens[rows:].fill_(0)
        kept.block_table[:rows, :batch.block_table.shape[1]].copy_(batch.block_table)
        kept.slots[:tokens].copy_(batch.slots)
        kept.slots[tokens:].fill_(-1)
        return out

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, meta: Any) -> None:
        """See `AttentionBackend.write`."""
        for new, kept in zip((k, v), cache.tensors, strict=True):
            paged_write(_heads_together(new), kept, meta.batch.slots)

    def attend(self, q: Tensor, cache: LayerCache, meta: Any, out: Tensor, sinks: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.attend`."""
        b = meta.batch
        k_cache, v_cache = cache.tensors
        return paged_attention_gpu(_heads_together(q), k_cache, v_cache, b.block_table, b.query_starts, b.context_tokens, self.scores,
                                   b.max_query_tokens, meta.splits, out)


def _heads_together(x: Tensor) -> Tensor:
    together = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if together else x.contiguous()
