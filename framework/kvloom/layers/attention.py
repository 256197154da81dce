"""Attention: over the paged state, to which this step's keys and values are written, or over this step's own tokens."""

from __future__ import annotations

from torch import Tensor, nn

from kvloom.errors import InternalError
from kvloom.interfaces.attention import AttentionSpec
from kvloom.interfaces.model import BuildContext, ForwardContext, LayerStep
from kvloom.interfaces.state import LayerStateSpec, StateKind
from kvloom.layers.base import dtype_name
from kvloom.layers.linear import local_heads
from kvloom.layers.norm import RMSNorm
from kvloom.layers.rotary import Rotation, rotate
from kvloom_kernels.scratch import empty_like


class Attention(nn.Module):
    """Per-head norms, rotary embedding, cache and scores; the projections before and after are the model's.

    Holds no weights but the norms that it is given. The backend may do norms, rotation and writing in one kernel, so a model
    leaves all of them to this layer.

    Args:
        layer_index: place in ``Model.state_specs()`` and in ``ForwardContext.layers``.
        num_heads, num_kv_heads: heads of the whole model.
        head_dim, value_dim: elements of a query or key head, and of a value head (the same unless given).
        window_tokens: a query sees itself and the ``window_tokens - 1`` tokens before it; None sees all.
        scale: factor on the scores, ``head_dim ** -0.5`` unless given.
        soft_cap: see `AttentionSpec`.
        causal: False for encoders.
        q_norm, k_norm: norms over each head, applied before the rotation; both or neither.

    Raises:
        ConfigError: the tensor-parallel size does not fit the heads, or no backend serves this layer.
    """

    def __init__(self, build: BuildContext, layer_index: int, num_heads: int, num_kv_heads: int, head_dim: int, *,
                 value_dim: int | None = None, window_tokens: int | None = None, scale: float | None = None,
                 soft_cap: float | None = None, causal: bool = True, q_norm: RMSNorm | None = None,
                 k_norm: RMSNorm | None = None) -> None:
        super().__init__()
        if (q_norm is None) != (k_norm is None):
            raise InternalError("give q_norm and k_norm, or neither")
        heads, kv_heads = local_heads(num_heads, num_kv_heads, build.comm.size)
        self.layer_index, self.q_norm, self.k_norm = layer_index, q_norm, k_norm
        self.spec = AttentionSpec(
            num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim or head_dim,
            scale=head_dim ** -0.5 if scale is None else scale, window_tokens=window_tokens, soft_cap=soft_cap, causal=causal,
            dtype=dtype_name(build.dtype), cache_dtype=dtype_name(build.cache_dtype), device=build.device_type,
            block_tokens=build.block_tokens)
        build.make_backend(self.spec, layer_index)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation | None, ctx: ForwardContext) -> Tensor:
        """``q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv]`` of this rank, views are fine -> ``[T, Hq * Dv]``.

        `q` and `k` may be changed in place. A rotation of None rotates nothing.
        """
        step = ctx.layers[self.layer_index]
        if step is None:
            raise InternalError(f"layer {self.layer_index} was given no attention state")
        backend, cache, meta = step
        if rotation is None or not self._fused(step, q, k, v, rotation):
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            if rotation is not None:
                q, k = rotate(q, rotation), rotate(k, rotation)
            backend.write(k, v, cache, meta)
        out = empty_like(q, (q.shape[0], self.spec.num_heads, self.spec.value_dim))
        return backend.attend(q, cache, meta, out).flatten(1)

    def _fused(self, step: LayerStep, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> bool:
        """Whether the backend did norms, rotation and writing at once."""
        q_norm, k_norm = (None if norm is None else norm.gain for norm in (self.q_norm, self.k_norm))
        eps = 0.0 if self.q_norm is None else self.q_norm.eps
        return step.backend.norm_rope_write(q, k, v, step.cache, step.meta, rotation.table, rotation.positions,
                                            q_norm, k_norm, eps)


class TokenAttention(nn.Module):
    """Rotary embedding and scores over this step's own tokens; nothing is kept. Its layer's state is `StateKind.NONE`.

    A model that has such layers computes a prompt in one step (`Model.chunkable` is False). Holds no weights.

    Args:
        layer_index: place in ``Model.state_specs()`` and in ``ForwardContext.layers``.
        num_heads, num_kv_heads: heads of the whole model.
        head_dim: elements of a head.
        window_tokens: a token sees itself and up to ``window_tokens - 1`` tokens on either side; None sees all.
        causal: True: only those before it.

    Raises:
        ConfigError: the tensor-parallel size does not fit the heads, or no backend serves this layer.
    """

    def __init__(self, build: BuildContext, layer_index: int, num_heads: int, num_kv_heads: int, head_dim: int, *,
                 window_tokens: int | None = None, causal: bool = False) -> None:
        super().__init__()
        heads, kv_heads = local_heads(num_heads, num_kv_heads, build.comm.size)
        self.layer_index = layer_index
        self.spec = AttentionSpec(
            num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, value_dim=head_dim, scale=head_dim ** -0.5,
            window_tokens=window_tokens, causal=causal, stored=False, dtype=dtype_name(build.dtype),
            cache_dtype=dtype_name(build.dtype), device=build.device_type, block_tokens=build.block_tokens)
        build.make_backend(self.spec, layer_index)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation | None, ctx: ForwardContext) -> Tensor:
        """``q [T, Hq, D], k [T, Hk, D], v [T, Hk, D]`` of this rank, views are fine -> ``[T, Hq * D]``."""
        step = ctx.layers[self.layer_index]
        if step is None:
            raise InternalError(f"layer {self.layer_index} was given no attention backend")
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out = q.new_empty((q.shape[0], self.spec.num_heads, self.spec.value_dim))
        return step.backend.attend_tokens(q, k, v, step.meta, out).flatten(1)


def attention_state(build: BuildContext, num_heads: int, num_kv_heads: int, head_dim: int, *, value_dim: int | None = None,
                    window_tokens: int | None = None) -> LayerStateSpec:
    """What an `Attention` layer of these whole-model sizes keeps on this rank, for ``Model.state_specs()``."""
    _, kv_heads = local_heads(num_heads, num_kv_heads, build.comm.size)
    kind = StateKind.FULL if window_tokens is None else StateKind.WINDOW
    return LayerStateSpec(kind, kv_heads, head_dim, value_dim or head_dim, window_tokens)
