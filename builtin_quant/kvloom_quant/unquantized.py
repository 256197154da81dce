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
from kvloom_kernels.linear import linear


class PlainLinear(LinearMethod):
    """``weight [out, in]`` in the model's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype_name(dtype)

    def params(self, shape: LinearShape, shard: str | None) -> Mapping[str, ParamSpec]:
        """See `LinearMethod`."""
        return {"weight": ParamSpec((dict(shape.shards)[shard], shape.in_features), self._dtype, in_axis=1, out_axis=0)}

    def apply(self, params: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """See `LinearMethod`."""
        return linear(x, params["weight"], bias)

    def dequantize(self, params: Mapping[str, Tensor]) -> Tensor:
        """See `LinearMethod`: the weight itself."""
        return params["weight"]

    @staticmethod
    def dequantize_reference(tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Tensor:
        """See `LinearMethod`: the weight in float32."""
        return tensors["weight"].float()


class PlainEmbedding(EmbeddingMethod):
    """``weight [V, H]`` in the model's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype_name(dtype)

    def params(self, rows: int, width: int) -> Mapping[str, ParamSpec]:
        """See `EmbeddingMethod`."""
        return {"weight": ParamSpec((rows, width), self._dtype, in_axis=1, out_axis=0)}

    def lookup(self, params: Mapping[str, Tensor], token_ids: Tensor) -> Tensor:
        """See `EmbeddingMethod`."""
        return functional.embedding(token_ids, params["weight"])

    def logits(self, params: Mapping[str, Tensor], hidden: Tensor, bias: Tensor | None) -> Tensor:
        """See `EmbeddingMethod`."""
        return linear(hidden, params["weight"], bias)


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

    def for_linear(self, shape: LinearShape, dtype: torch.dtype) -> LinearMethod:
        """See `QuantMethod`."""
        return PlainLinear(dtype)

    def for_embedding(self, prefix: str, dtype: torch.dtype) -> EmbeddingMethod:
        """See `QuantMethod`."""
        return PlainEmbedding(dtype)
