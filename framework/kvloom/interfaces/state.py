"""What a layer keeps between steps, and how layers are grouped over one block table. Torch-free.

A model answers ``state_specs()`` with one `LayerStateSpec` a layer; the engine groups them into `KVGroup`s, the core
hands out blocks per group, the runtime allocates the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class StateKind(StrEnum):
    """How long a layer's state is kept and what it grows with."""

    FULL = "full"            # keys and values of every token
    WINDOW = "window"        # keys and values of the last `window_tokens` tokens
    CROSS = "cross"          # keys and values of an encoder's output: as many as the encoder has tokens, written once
    LATENT = "latent"        # one compressed row a token (multi-head latent attention)
    RECURRENT = "recurrent"  # a fixed number of bytes a sequence, overwritten each step
    NONE = "none"            # nothing (encoders, plain MLP layers)
    SHARED = "shared"        # reads the state of layer `shared_with`


@dataclass(frozen=True, slots=True)
class LayerStateSpec:
    """State of one layer on one rank (heads are already divided by the tensor-parallel size).

    Args:
        kind: see `StateKind`.
        num_kv_heads: key heads on this rank (FULL, WINDOW, CROSS).
        key_dim: elements of one key head; for LATENT the width of the one row that is kept.
        value_dim: elements of one value head; 0 for LATENT.
        window_tokens: for WINDOW: a token sees itself and the ``window_tokens - 1`` before it.
        shapes: for RECURRENT: ``((shape, dtype name), ...)`` of one sequence's state.
        shared_with: for SHARED: index of the layer whose state is read.
        dtype: dtype name of the stored state; None means the engine's KV cache dtype.
    """

    kind: StateKind
    num_kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window_tokens: int | None = None
    shapes: tuple[tuple[tuple[int, ...], str], ...] = ()
    shared_with: int | None = None
    dtype: str | None = None

    @property
    def elements_per_token(self) -> int:
        """Elements kept for one token; 0 where the state does not grow with tokens."""
        if self.kind is StateKind.LATENT:
            return self.key_dim
        if self.kind in (StateKind.FULL, StateKind.WINDOW, StateKind.CROSS):
            return self.num_kv_heads * (self.key_dim + self.value_dim)
        return 0

    @property
    def retention(self) -> tuple[StateKind, int | None]:
        """Layers with equal retention can share a block table: they need the same blocks at the same time."""
        return (self.kind, self.window_tokens if self.kind is StateKind.WINDOW else None)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one block table.

    Block ids are unique over all groups (one pool); the j-th layer of each group lives in the j-th KV tensor, so a block
    belongs to whichever group holds it and no memory is divided beforehand.

    Args:
        index: position in every ``block_ids`` tuple of a `Step`.
        kind: FULL, WINDOW, CROSS, LATENT or RECURRENT (RECURRENT: one block is one sequence's whole state).
        layers: indices of the layers, in order.
        block_tokens: tokens in one block, the same for all groups.
        window_tokens: for WINDOW: blocks that end before ``position - window_tokens + 1`` are given back.
    """

    index: int
    kind: StateKind
    layers: tuple[int, ...]
    block_tokens: int
    window_tokens: int | None = None

    def max_blocks(self, tokens: int, step_tokens: int = 1) -> int:
        """Most blocks that one sequence of `tokens` tokens holds at a time.

        A window gives back what no later token reads. Before a step it holds what the step's first token reads, and the step's
        own tokens: a run of ``window_tokens - 1 + step_tokens``, which touches one block more when it starts inside a block.

        Args:
            tokens: that the sequence keeps; its last one is sampled and never stored.
            step_tokens: that are added at a time. 1 where a step may be made as small as its blocks demand, `tokens` where a
                prompt is never cut.
        """
        if self.kind is StateKind.RECURRENT:
            return 1
        columns = -(-tokens // self.block_tokens)
        if self.window_tokens is None:
            return columns
        return min(columns, -(-(self.window_tokens - 2 + step_tokens) // self.block_tokens) + 1)
