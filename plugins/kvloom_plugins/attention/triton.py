"""The CUDA backend: our Triton kernels, all rows of a step in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvloom.interfaces import AttentionBatch, AttentionSpec, LayerCache
from kvloom_kernels.gpu.attention import norm_rope_write_gpu, paged_attention_gpu, paged_write, split_count
from kvloom_plugins.attention.paged import PagedAttention, are_together, heads_together


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
        """See `AttentionBackend.prepare`. Kernels read the batch's own memory, so there is nothing to refill."""
        if out is not None:
            return out
        return TritonMeta(batch, split_count(len(batch.context_tokens_host) * self.spec.num_kv_heads, batch.max_context_tokens))

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, meta: Any) -> None:
        """See `AttentionBackend.write`."""
        for new, kept in zip((k, v), cache.tensors, strict=True):
            paged_write(heads_together(new), kept, meta.batch.slots)

    def attend(self, q: Tensor, cache: LayerCache, meta: Any, out: Tensor, sinks: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.attend`."""
        b = meta.batch
        k_cache, v_cache = cache.tensors
        return paged_attention_gpu(heads_together(q), k_cache, v_cache, b.block_table, b.query_starts, b.context_tokens, self.scores,
                                   b.max_query_tokens, meta.splits, out)

    def norm_rope_write(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, meta: Any, cos_sin: Tensor, positions: Tensor,
                        q_norm: Tensor | None, k_norm: Tensor | None, eps: float) -> bool:
        """See `AttentionBackend.norm_rope_write`."""
        if not all(are_together(x) for x in (q, k, v)):
            return False
        norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
        k_cache, v_cache = cache.tensors
        norm_rope_write_gpu(q, k, v, k_cache, v_cache, meta.batch.slots, cos_sin, positions, norms, eps)
        return True
