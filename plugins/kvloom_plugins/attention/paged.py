"""What backends over ``[N, Hk, B, D]`` caches share: shapes, writing, and what they do not serve."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from kvloom.interfaces import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache, TensorShape
from kvloom_kernels.attention import Scores


class PagedAttention(AttentionBackend):
    """Keys and values in blocks, head by head."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.scores = Scores(spec.scale, spec.window_tokens, spec.soft_cap, spec.causal)

    @classmethod
    def supports(cls, spec: AttentionSpec) -> str | None:
        """See `AttentionBackend.supports`."""
        if spec.cross or spec.latent:
            return "it has no cross or latent attention"
        if spec.dtype != spec.cache_dtype:
            return f"it keeps keys and values in the model's dtype, not in {spec.cache_dtype}"
        return None

    def state_shapes(self) -> tuple[TensorShape, ...]:
        """See `AttentionBackend.state_shapes`."""
        s = self.spec
        return (TensorShape((s.num_kv_heads, s.block_tokens, s.head_dim), s.cache_dtype),
                TensorShape((s.num_kv_heads, s.block_tokens, s.value_dim), s.cache_dtype))

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, meta: Any) -> None:
        """See `AttentionBackend.write`."""
        block, offset = self.slots(meta)
        for new, kept in ((k, cache.tensors[0]), (v, cache.tensors[1])):
            kept[block, :, offset] = new

    @abstractmethod
    def slots(self, meta: Any) -> tuple[Tensor, Tensor]:
        """Block and offset of each token, ``[T]`` each."""


def split_slots(batch: AttentionBatch, block_tokens: int) -> tuple[Tensor, Tensor]:
    """Block and offset of each token, ``[T]`` int64 each."""
    return batch.slots // block_tokens, batch.slots % block_tokens
