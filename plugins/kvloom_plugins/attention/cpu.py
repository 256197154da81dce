"""The CPU backend: our C++ kernel, all rows of a step in one call."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from kvloom.interfaces import AttentionBatch, AttentionSpec, LayerCache, TensorShape
from kvloom_kernels.attention import WORKSPACE_BYTES, cache_shapes, norm_rope_write, paged_attention
from kvloom_kernels.native import problem
from kvloom_kernels.token_attention import token_attention
from kvloom_plugins.attention.paged import PagedAttention, PagedMeta, are_together, heads_together


class CpuAttention(PagedAttention):
    """Keys and values lie as the kernel multiplies them, see `cache_shapes`."""

    graph_support = range_graph_support = True
    row_invariant = True

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8)

    @classmethod
    def supports(cls, spec: AttentionSpec) -> str | None:
        """See `AttentionBackend.supports`."""
        return super().supports(spec) or problem()

    def state_shapes(self) -> tuple[TensorShape, ...]:
        """See `AttentionBackend.state_shapes`."""
        s = self.spec
        shapes = cache_shapes(s.num_kv_heads, s.head_dim, s.value_dim, s.block_tokens, getattr(torch, s.cache_dtype))
        return tuple(TensorShape(shape, s.cache_dtype) for shape in shapes)

    def prepare(self, batch: AttentionBatch, out: Any = None) -> PagedMeta:
        """See `AttentionBackend.prepare`."""
        if out is not None:  # kernels read the batch's own memory
            return cast(PagedMeta, out)
        batch.block_table = batch.block_table.contiguous()
        return super().prepare(batch)

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, meta: PagedMeta) -> None:
        """See `AttentionBackend.write`."""
        k, v = heads_together(k), heads_together(v)
        k_cache, v_cache = cache.tensors
        norm_rope_write(k[:, :0], k, v, k_cache, v_cache, meta.batch.slots, self.spec.block_tokens)

    def attend(self, q: Tensor, cache: LayerCache, meta: PagedMeta, out: Tensor, sinks: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.attend`."""
        batch = meta.batch
        k_cache, v_cache = cache.tensors
        return paged_attention(heads_together(q), k_cache, v_cache, batch.block_table, batch.query_starts, batch.context_tokens,
                               self.scores, self.spec.block_tokens, self._workspace, out,
                               None if sinks is None else sinks.float().contiguous())

    def attend_tokens(self, q: Tensor, k: Tensor, v: Tensor, meta: PagedMeta, out: Tensor) -> Tensor:
        """See `AttentionBackend.attend_tokens`."""
        return token_attention(heads_together(q), heads_together(k), heads_together(v), meta.batch.query_starts, self.scores, out)

    def norm_rope_write(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, meta: PagedMeta, cos_sin: Tensor,
                        positions: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float) -> bool:
        """See `AttentionBackend.norm_rope_write`."""
        if not all(are_together(x) for x in (q, k, v)):
            return False
        norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
        k_cache, v_cache = cache.tensors
        norm_rope_write(q, k, v, k_cache, v_cache, meta.batch.slots, self.spec.block_tokens, (cos_sin, positions), norms, eps)
        return True
