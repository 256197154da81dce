"""The plain backend: one sequence at a time, in float32. For truth, not for speed."""

from __future__ import annotations

from torch import Tensor

from kvloom.interfaces import LayerCache
from kvloom_kernels.attention import paged_attention_reference
from kvloom_kernels.token_attention import token_attention_reference
from kvloom_plugins.attention.paged import PagedAttention, PagedMeta


class ReferenceAttention(PagedAttention):
    """Serves everything that a paged cache can hold, and what needs none, on every device."""

    def attend(self, q: Tensor, cache: LayerCache, meta: PagedMeta, out: Tensor, sinks: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.attend`."""
        batch = meta.batch
        k_cache, v_cache = cache.tensors
        return out.copy_(paged_attention_reference(q, k_cache, v_cache, batch.block_table, batch.query_starts_host,
                                                   batch.context_tokens_host, self.scores, sinks))

    def attend_tokens(self, q: Tensor, k: Tensor, v: Tensor, meta: PagedMeta, out: Tensor) -> Tensor:
        """See `AttentionBackend.attend_tokens`."""
        return out.copy_(token_attention_reference(q, k, v, meta.batch.query_starts_host, self.scores))
