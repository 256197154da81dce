"""What backends over a paged cache of keys and values share: shapes, writing, and what they do not serve."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from kvloom.interfaces import AttentionBackend, AttentionBatch, AttentionSpec, LayerCache, TensorShape
from kvloom_kernels.attention import Scores


@dataclass
class PagedMeta:
    """A step's rows."""

    batch: AttentionBatch
    block_tokens: int

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Block and offset of each of its tokens, ``[T]`` int64 each."""
        return self.batch.slots // self.block_tokens, self.batch.slots % self.block_tokens


class PagedAttention(AttentionBackend):
    """Keys ``[N, Hk, B, D]`` and values ``[N, Hk, B, Dv]`` in blocks, head by head."""

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
        if spec.sinks and not spec.stored:
            return "it has no sinks where nothing is stored"
        return None

    def state_shapes(self) -> tuple[TensorShape, ...]:
        """See `AttentionBackend.state_shapes`."""
        s = self.spec
        return (TensorShape((s.num_kv_heads, s.block_tokens, s.head_dim), s.cache_dtype),
                TensorShape((s.num_kv_heads, s.block_tokens, s.value_dim), s.cache_dtype))

    def prepare(self, batch: AttentionBatch, out: Any = None) -> PagedMeta:
        """See `AttentionBackend.prepare`."""
        return PagedMeta(batch, self.spec.block_tokens)

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, meta: PagedMeta) -> None:
        """See `AttentionBackend.write`."""
        block, offset = meta.places
        for new, kept in ((k, cache.tensors[0]), (v, cache.tensors[1])):
            kept[block, :, offset] = new


def are_together(x: Tensor) -> bool:
    """Whether a token's heads ``[heads, D]`` lie one after the other."""
    return x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])


def heads_together(x: Tensor) -> Tensor:
    """``x [T, heads, D]`` so that they do."""
    return x if are_together(x) else x.contiguous()
