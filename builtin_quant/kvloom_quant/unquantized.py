"""Plain floating-point weights: the method "none", and what serves the layers that another method declines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvloom.errors import ConfigError
from kvloom.interfaces.quant import EmbeddingMethod, LinearMethod, LinearShape, ParamSpec, QuantMethod
from kvloom.layers.base import dtype_name
from kvloom_kernels.activation import Finish
from kvloom_kernels.call import computes
from kvloom_kernels.linear import WeightShape, can_pack, lookup, pack, product, unpack

FINISHES = {"silu": Finish.SILU, "swish": Finish.SILU, "gelu": Finish.GELU, "gelu_pytorch_tanh": Finish.GELU_TANH,
            "gelu_new": Finish.GELU_TANH}
"""Activations that the product does itself, by their config.json names."""


class PlainLinear(LinearMethod):
    """``weight [out, in]`` in the model's dtype; on a CPU with kernels packed once it is loaded."""

    def __init__(self, shape: LinearShape, dtype: torch.dtype) -> None:
        self._dtype = dtype_name(dtype)
        self._packed = WeightShape(sum(shape.local_out_features(shard) for shard, _ in shape.shards), shape.local_in_features)

    def post_load(self, shape: LinearShape, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `LinearMethod`."""
        weight = params["weight"]
        return {"packed": pack(weight)} if can_pack(weight) else params

    def params(self, shape: LinearShape, shard: str | None) -> Mapping[str, ParamSpec]:
        """See `LinearMethod`."""
        return {"weight": ParamSpec((dict(shape.shards)[shard], shape.in_features), self._dtype, in_axis=1, out_axis=0)}

    def apply(self, params: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """See `LinearMethod`."""
        if "packed" in params:
            return product(x, params["packed"], self._packed, bias)
        return functional.linear(x, params["weight"], bias)

    def apply_gated(self, params: Mapping[str, Tensor], x: Tensor, bias: Tensor | None, activation: str) -> Tensor | None:
        """See `LinearMethod`."""
        if "packed" not in params or activation not in FINISHES:
            return None
        return product(x, params["packed"], self._packed, bias, FINISHES[activation])

    def dequantize(self, params: Mapping[str, Tensor]) -> Tensor:
        """See `LinearMethod`: the weight itself."""
        return unpack(params["packed"], self._packed) if "packed" in params else params["weight"]

    @staticmethod
    def dequantize_reference(tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Tensor:
        """See `LinearMethod`: the weight in float32."""
        return tensors["weight"].float()


class PlainEmbedding(EmbeddingMethod):
    """``weight [V, H]`` in the model's dtype; that of an output head is packed, on a CPU with kernels, and rows are read from there."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype_name(dtype)
        self._packed: WeightShape | None = None

    def post_load(self, params: dict[str, Tensor], *, is_head: bool) -> dict[str, Tensor]:
        """See `EmbeddingMethod`."""
        weight = params["weight"]
        if not is_head or not can_pack(weight):
            return params
        self._packed = WeightShape(*weight.shape)
        return {**params, "weight": pack(weight)}

    def params(self, rows: int, width: int) -> Mapping[str, ParamSpec]:
        """See `EmbeddingMethod`."""
        return {"weight": ParamSpec((rows, width), self._dtype, in_axis=1, out_axis=0)}

    def lookup(self, params: Mapping[str, Tensor], token_ids: Tensor) -> Tensor:
        """See `EmbeddingMethod`."""
        return lookup(token_ids, params["weight"], self._packed)

    def logits(self, params: Mapping[str, Tensor], hidden: Tensor, bias: Tensor | None) -> Tensor:
        """See `EmbeddingMethod`."""
        if self._packed is None:
            return functional.linear(hidden, params["weight"], bias)
        return product(hidden, params["weight"], self._packed, bias, widened=True)


class Unquantized(QuantMethod):
    """Every layer in the model's dtype.

    Raises:
        ConfigError: it was given settings; a checkpoint with a ``quantization_config`` is served by the method it names.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        if settings:
            raise ConfigError(f"the plain weight format has no settings, got {dict(settings)}; choose the method that "
                              f"quantization_config names")

    @classmethod
    def row_invariant(cls, dtype: torch.dtype, device: torch.device) -> str | None:
        """See `QuantMethod`: our kernels sum each row in one order, torch's choose by the number of rows."""
        return None if computes(dtype, device) else f"{dtype_name(dtype)} is multiplied by torch here"

    def for_linear(self, shape: LinearShape, dtype: torch.dtype) -> LinearMethod:
        """See `QuantMethod`."""
        return PlainLinear(shape, dtype)

    def for_embedding(self, prefix: str, dtype: torch.dtype) -> EmbeddingMethod:
        """See `QuantMethod`."""
        return PlainEmbedding(dtype)
