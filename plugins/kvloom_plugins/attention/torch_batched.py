"""Attention in torch, where our C++ kernel cannot run: rows of one query token in one call, longer rows one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from kvloom.interfaces import AttentionBatch, AttentionSpec, LayerCache
from kvloom_kernels.attention import decode_mask, paged_attention_reference, paged_decode
from kvloom_kernels.token_attention import token_attention_torch
from kvloom_kernels.transfer import to_device
from kvloom_plugins.attention.paged import PagedAttention, PagedMeta


class DecodeRows(NamedTuple):
    """Rows of one query token whose contexts are of similar length."""

    tokens: Tensor
    block_table: Tensor
    mask: Tensor


@dataclass
class TorchMeta(PagedMeta):
    """A step's rows by kind; `prompts`: index of each row of several tokens."""

    decodes: list[DecodeRows]
    prompts: list[int]


class TorchAttention(PagedAttention):
    """See the module's docstring."""

    @classmethod
    def supports(cls, spec: AttentionSpec) -> str | None:
        """See `AttentionBackend.supports`."""
        if spec.soft_cap is not None or spec.sinks:
            return "it has no soft cap and no sinks"
        return super().supports(spec)

    def prepare(self, batch: AttentionBatch, out: Any = None) -> TorchMeta:
        """See `AttentionBackend.prepare`."""
        if not self.spec.stored:
            return TorchMeta(batch, self.spec.block_tokens, [], [])
        counts = np.diff(batch.query_starts_host)
        return TorchMeta(batch, self.spec.block_tokens, self._decode_rows(batch, np.flatnonzero(counts == 1)),
                         np.flatnonzero(counts > 1).tolist())

    def _decode_rows(self, batch: AttentionBatch, rows: np.ndarray[Any, Any]) -> list[DecodeRows]:
        """Group rows by the power of two above their context, so that short ones do not read as much as the longest."""
        buckets: dict[int, list[int]] = {}
        for row in rows.tolist():
            buckets.setdefault(int(batch.context_tokens_host[row]).bit_length(), []).append(row)
        found = []
        for members in buckets.values():
            index = to_device(np.array(members), batch.context_tokens.device)
            columns = -(-int(batch.context_tokens_host[members].max()) // self.spec.block_tokens)
            mask = decode_mask(batch.context_tokens[index], columns, self.spec.block_tokens, self.scores)
            found.append(DecodeRows(batch.query_starts[index].long(), batch.block_table[index, :columns], mask))
        return found

    def attend(self, q: Tensor, cache: LayerCache, meta: PagedMeta, out: Tensor, sinks: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.attend`."""
        if not isinstance(meta, TorchMeta):
            raise TypeError(f"meta must be what prepare gave, got {type(meta).__name__}")
        k_cache, v_cache = cache.tensors
        for rows in meta.decodes:
            out[rows.tokens] = paged_decode(q[rows.tokens], k_cache, v_cache, rows.block_table, rows.mask, self.scores)
        batch = meta.batch
        for r in meta.prompts:
            start, stop = batch.query_starts_host[r], batch.query_starts_host[r + 1]
            out[start:stop] = paged_attention_reference(
                q[start:stop], k_cache, v_cache, batch.block_table[r:r + 1], np.array([0, stop - start]),
                batch.context_tokens_host[r:r + 1], self.scores)
        return out

    def attend_tokens(self, q: Tensor, k: Tensor, v: Tensor, meta: PagedMeta, out: Tensor) -> Tensor:
        """See `AttentionBackend.attend_tokens`."""
        return token_attention_torch(q, k, v, meta.batch.query_starts_host, self.scores, out)
