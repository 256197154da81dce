"""The plain backend: one sequence at a time, in float32. For truth, not for speed."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from kvloom.interfaces import AttentionBatch, LayerCache
from kvloom_kernels.attention import paged_attention_reference
from kvloom_plugins.attention.paged import PagedAttention, split_slots


class ReferenceMeta(NamedTuple):
    """The step's rows, and where its tokens are written."""

    batch: AttentionBatch
    slots: tuple[Tensor, Tensor]


class ReferenceAttention(PagedAttention):
    """Serves everything that a paged cache can hold, on every device."""

    def prepare(self, batch: AttentionBatch, out: Any = None) -> ReferenceMeta:
        """See `AttentionBackend.prepare`."""
        return ReferenceMeta(batch, split_slots(batch, self.spec.block_tokens))

    def slots(self, meta: Any) -> tuple[Tensor, Tensor]:
        """See `PagedAttention.slots`."""
        return meta.slots

    def attend(self, q: Tensor, cache: LayerCache, meta: Any, out: Tensor, sinks: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.attend`."""
        batch = meta.batch
        return out.copy_(paged_attention_reference(q, *cache.tensors, batch.block_table, batch.query_starts_host,
                                                   batch.context_tokens_host, self.scores, sinks))
