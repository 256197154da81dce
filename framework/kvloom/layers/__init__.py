"""What models are built from. A layer owns its sharding, its fused parts and its quantization; a model says what follows what.

Every layer takes the `BuildContext` first, then sizes of the whole model; every forward takes the `ForwardContext` last.
"""

from __future__ import annotations

from kvloom.layers.activation import activation, gated
from kvloom.layers.attention import Attention, TokenAttention, attention_state
from kvloom.layers.base import LoadableModule
from kvloom.layers.embedding import Embedding, LMHead
from kvloom.layers.fused import FusedShards
from kvloom.layers.linear import ColumnLinear, GateUpLinear, Linear, LinearLayer, QKVLinear, RowLinear
from kvloom.layers.norm import LayerNorm, RMSNorm
from kvloom.layers.rotary import Rotary, Rotation, rotate

__all__ = [
    "Attention",
    "ColumnLinear",
    "Embedding",
    "FusedShards",
    "GateUpLinear",
    "LMHead",
    "LayerNorm",
    "Linear",
    "LinearLayer",
    "LoadableModule",
    "QKVLinear",
    "RMSNorm",
    "Rotary",
    "Rotation",
    "RowLinear",
    "TokenAttention",
    "activation",
    "attention_state",
    "gated",
    "rotate",
]
