"""Attention backends: where keys and values live, how they are written, how queries read them.

A backend is made once per distinct `AttentionSpec` and engine. Per step it sees `prepare` once per KV group, then `write`
and `attend` once per layer; where nothing is stored, `attend_tokens` instead of the two. No method may synchronise the device
with the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvloom.errors import InternalError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Everything about an attention layer that decides whether a backend can serve it. Names, not objects: torch-free.

    Args:
        num_heads: query heads on this rank (Hq).
        num_kv_heads: key heads on this rank (Hk); Hq is a multiple of it.
        head_dim: elements of a query or key head (D).
        value_dim: elements of a value head (Dv).
        scale: factor on the scores, usually ``D ** -0.5``.
        window_tokens: a query sees itself and the ``window_tokens - 1`` tokens before it, and if not causal, as many after it;
            None sees all.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``; None leaves them.
        sinks: one learned extra logit per query head takes part in the softmax.
        causal: False for encoders: every token of a range sees every token of it.
        stored: False where nothing is kept (`StateKind.NONE`): tokens see tokens of the same step only, by `attend_tokens`.
        cross: keys come from an encoder, see `AttentionBatch.encoder_tokens`.
        latent: keys and values are one compressed row (`StateKind.LATENT`).
        dtype: dtype name of q, k, v and the output.
        cache_dtype: dtype name of the stored keys and values.
        device: "cpu", "cuda", ...: that it will run on, also while only shapes are wanted.
        block_tokens: tokens in one block.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window_tokens: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    causal: bool = True
    stored: bool = True
    cross: bool = False
    latent: bool = False
    dtype: str = "float32"
    cache_dtype: str = "float32"
    device: str = "cpu"
    block_tokens: int = 16


class TensorShape(NamedTuple):
    """One tensor of a layer's state: shape without the leading block axis, and dtype name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(slots=True)
class AttentionBatch:
    """The rows of one step for one KV group. Index tensors are on the device; ``*_host`` are the same numbers on the host.

    R rows (one a sequence) in the order of ``Step.ranges``, T tokens in all. Layers that keep nothing get one, too, with an empty
    `block_table` and empty `slots`.

    Args:
        query_starts: ``[R + 1]`` int32; row r owns tokens ``[query_starts[r], query_starts[r + 1])``.
        context_tokens: ``[R]`` int32; tokens that exist after this step's write, the range's own included.
        block_table: ``[R, B]`` int32; entry j holds tokens ``[j * block_tokens, (j + 1) * block_tokens)``; 0 = nobody's.
            B is the longest row's need; the rest of a shorter row is 0.
        slots: ``[T]`` int64; ``block * block_tokens + offset`` where each token's key and value are written.
        query_starts_host, context_tokens_host: numpy copies; a backend branches on these, never on device values.
        max_query_tokens, max_context_tokens: largest range and context; of a captured step the largest that a repetition may have.
        encoder_tokens: for cross attention ``[R]`` int32 encoder rows; None otherwise.
    """

    query_starts: Tensor
    context_tokens: Tensor
    block_table: Tensor
    slots: Tensor
    query_starts_host: np.ndarray[Any, Any]
    context_tokens_host: np.ndarray[Any, Any]
    max_query_tokens: int
    max_context_tokens: int
    encoder_tokens: Tensor | None = None


@dataclass(slots=True)
class LayerCache:
    """One layer's state: tensors as `AttentionBackend.state_shapes` asked, each with a leading block axis.

    `k_scale` and `v_scale` are float32 scalars or ``[Hk]`` of a scaled cache (fp8), else None.
    """

    layer_index: int
    tensors: tuple[Tensor, ...]
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class AttentionBackend(ABC):
    """Reads and writes the paged state of attention layers that have one `AttentionSpec`.

    The constructor takes the spec alone. Registered with ``kvloom_register_attention_backends``.
    """

    graph_support = False
    """Whether `write` and `attend` may be captured and replayed: fixed buffers, no host branches on batch contents."""
    range_graph_support = False
    """Whether a step may also be captured once for all others: `write` and `attend` follow from what the batch's tensors hold alone.
    They are those of the longest step; tokens beyond the last range are nobody's, ranges beyond it are empty, with a context of 0."""
    row_invariant = False
    """Whether a token's result has the same bits whatever other rows the step has, and however its sequence was cut into steps.
    What ``deterministic=True`` asks for."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    @classmethod
    @abstractmethod
    def supports(cls, spec: AttentionSpec) -> str | None:
        """None when this backend serves `spec`; else the reason why not, as a phrase for the start report."""

    @abstractmethod
    def state_shapes(self) -> tuple[TensorShape, ...]:
        """Tensors of one layer, each without its leading block axis, e.g. K and V as ``[Hk, block_tokens, D]``.

        The engine allocates ``[num_blocks, *shape]``, zeroed, so that what is masked is at least finite.
        """

    @abstractmethod
    def prepare(self, batch: AttentionBatch, out: Any = None) -> Any:
        """Derive whatever `attend` needs from the batch, once a step and group.

        The result is opaque to the engine and handed to `write` and `attend` of every layer of the group. A captured step is repeated
        with other numbers in the batch's memory and as many rows or fewer; before each time `out` is the result that was captured:
        what was derived into memory of its own is derived again, in place, and `out` returned. None allocates.
        """

    @abstractmethod
    def write(self, k: Tensor, v: Tensor, cache: LayerCache, meta: Any) -> None:
        """Store ``k [T, Hk, D]`` and ``v [T, Hk, Dv]`` at the batch's slots. Token t of range r has position
        ``context_tokens[r] - range length + (t - query_starts[r])``."""

    @abstractmethod
    def attend(self, q: Tensor, cache: LayerCache, meta: Any, out: Tensor, sinks: Tensor | None = None) -> Tensor:
        """``q [T, Hq, D]`` against the stored state; fills and returns ``out [T, Hq, Dv]``.

        Block-table entries outside a row's context or window may belong to others: they must not influence the result,
        not even through NaN. `sinks` is ``[Hq]`` when the spec has sinks.
        """

    def attend_tokens(self, q: Tensor, k: Tensor, v: Tensor, meta: Any, out: Tensor) -> Tensor:
        """Attention without state: ``q [T, Hq, D]`` against this step's own ``k [T, Hk, D]`` and ``v [T, Hk, Dv]``; fills and returns
        ``out [T, Hq, Dv]``. Tokens of a range see tokens of that range only, and each range begins at position 0.

        Called only where ``spec.stored`` is False; a backend whose `supports` takes such a spec implements it.
        """
        raise InternalError(f"{type(self).__name__} took {self.spec}, but has no attend_tokens")

    def norm_rope_write(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, meta: Any, cos_sin: Tensor,
                        positions: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float) -> bool:
        """Optional fusion of per-head norm, rotary embedding and `write`, in place on q and k.

        Returns False when the backend does not fuse; the layer then does the three steps itself.
        """
        return False
