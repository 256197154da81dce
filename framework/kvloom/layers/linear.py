"""Linear layers: they own tensor parallelism and fused parts, so that a model only says what is multiplied.

The order inside every layer is product -> adapter delta -> collective. Shapes: T tokens; sizes given to a constructor are
those of the whole model, tensors that a forward returns have this rank's sizes.

    Linear        every rank has all of it                                       x [T, in]         -> [T, out]
    ColumnLinear  output features divided                                        x [T, in]         -> [T, out / size]
    GateUpLinear  two of them side by side, maybe activated                      x [T, in]         -> [T, 2 * out / size]
    QKVLinear     three, by attention heads                                      x [T, in]         -> q, k, v [T, heads / size, D]
    RowLinear     input features divided; the results are summed over the ranks  x [T, in / size]  -> [T, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvloom.errors import ConfigError, PluginError
from kvloom.interfaces.model import BuildContext, ForwardContext
from kvloom.interfaces.quant import LinearShape, ParamSpec
from kvloom.layers.activation import activation, gated
from kvloom.layers.base import LoadableModule, dtype_name
from kvloom.layers.params import in_span, out_spans


class LinearLayer(LoadableModule):
    """What the linear layers below share. Models use those; a layer of another shape may derive from this one.

    Args:
        shape: features, fused shards, and how tensor parallelism divides them.
        bias: whether the checkpoint has a bias for every shard.

    Raises:
        ConfigError: the tensor-parallel size does not divide the layer.
        PluginError: the quantization method describes tensors that do not fit the layer.
    """

    def __init__(self, build: BuildContext, shape: LinearShape, *, bias: bool) -> None:
        super().__init__(shape.prefix)
        method = build.quant.for_linear(shape, build.dtype) or build.plain.for_linear(shape, build.dtype)
        if method is None:
            raise PluginError(f"{shape.prefix}: neither {type(build.quant).__name__} nor the plain method serves this layer")
        self.in_features, self.shards, self.sharded_axis = shape.in_features, shape.shards, shape.sharded_axis
        self._shape, self._method = shape, method
        specs: dict[str | None, Mapping[str, ParamSpec]] = {}
        for shard, features in shape.shards:
            own = {"bias": ParamSpec((features,), dtype_name(build.dtype), out_axis=0)} if bias else {}
            specs[shard] = {**method.params(shape, shard), **own}
        self.add_params(specs, in_span(shape), out_spans(shape), build.device)
        self._split_bias()

    def _split_bias(self) -> None:
        """A method never sees the bias among its tensors: it gets it as an argument."""
        self._weights = {suffix: tensor for suffix, tensor in self.tensors.items() if suffix != "bias"}
        self._bias = self.tensors.get("bias")

    def finish(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let the quantization method pack, transpose or merge; the bias stays."""
        bias = {"bias": tensors.pop("bias")} if "bias" in tensors else {}
        return {**self._method.post_load(self._shape, tensors), **bias}

    def post_load(self) -> None:
        """See `LoadableLayer`."""
        super().post_load()
        self._split_bias()

    def dequantize(self) -> Tensor:
        """The weight ``[out, in]`` of this rank in floating point, shards side by side. After `post_load` only."""
        return self._method.dequantize(self._weights)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Any:
        """``x [T, in]`` -> ``[T, out]`` of this rank, in x's dtype."""
        return self.product(x, self._bias, ctx)

    def product(self, x: Tensor, bias: Tensor | None, ctx: ForwardContext) -> Tensor:
        """Product and adapter delta: ``x [T, in] -> [T, out]``, both of this rank."""
        y = self._method.apply(self._weights, x, bias)
        return y if ctx.adapters is None else ctx.adapters.add_delta(self.prefix, x, y)


class Linear(LinearLayer):
    """Every rank has all of it (routers, small projections): ``[T, in] -> [T, out]``.

    Args:
        prefix: checkpoint module prefix.
        in_features, out_features: whole sizes.
        bias: whether the checkpoint has a bias.
    """

    def __init__(self, build: BuildContext, prefix: str, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(build, LinearShape(prefix, in_features, ((None, out_features),)), bias=bias)


class ColumnLinear(LinearLayer):
    """Output features divided over the ranks: ``[T, in] -> [T, out / size]``. Arguments as `Linear`."""

    def __init__(self, build: BuildContext, prefix: str, in_features: int, out_features: int, *, bias: bool = False) -> None:
        shape = LinearShape(prefix, in_features, ((None, out_features),), "out", build.comm.rank, build.comm.size)
        super().__init__(build, shape, bias=bias)


class RowLinear(LinearLayer):
    """Input features divided over the ranks: ``[T, in / size] -> [T, out]``, the same on every rank. Arguments as `Linear`.

    The bias is added once, on rank 0, before the sum.
    """

    def __init__(self, build: BuildContext, prefix: str, in_features: int, out_features: int, *, bias: bool = False) -> None:
        shape = LinearShape(prefix, in_features, ((None, out_features),), "in", build.comm.rank, build.comm.size)
        super().__init__(build, shape, bias=bias)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """``x [T, in / size] -> [T, out]``, summed over the ranks."""
        return ctx.comm.all_reduce(self.product(x, self._bias if ctx.comm.rank == 0 else None, ctx))


class GateUpLinear(LinearLayer):
    """Shards ``"gate"`` and ``"up"`` of a gated MLP in one product: ``[T, in] -> [T, 2 * features / size]``, gate first.

    Args:
        prefix: checkpoint module prefix of the gate.
        features: output features of each.
    """

    def __init__(self, build: BuildContext, prefix: str, in_features: int, features: int, *, bias: bool = False) -> None:
        shards = (("gate", features), ("up", features))
        super().__init__(build, LinearShape(prefix, in_features, shards, "out", build.comm.rank, build.comm.size), bias=bias)

    def forward(self, x: Tensor, ctx: ForwardContext, act: str | None = None) -> Tensor:
        """``x [T, in]`` -> ``[T, 2 * features / size]``; with an activation ``act(gate) * up``, ``[T, features / size]``, in one step
        where the method can.

        Args:
            act: the activation's name in config.json.
        """
        if act is None:
            return self.product(x, self._bias, ctx)
        done = None if ctx.adapters is not None else self._method.apply_gated(self._weights, x, self._bias, act)
        return gated(activation(act), self.product(x, self._bias, ctx)) if done is None else done


class QKVLinear(LinearLayer):
    """Shards ``"q"``, ``"k"``, ``"v"`` of an attention layer in one product, divided by heads.

    Where there are fewer kv heads than ranks, ``size / num_kv_heads`` consecutive ranks hold the same kv head.

    Args:
        prefix: checkpoint module prefix of the query.
        num_heads, num_kv_heads: heads of the whole model.
        head_dim, value_dim: elements of a query or key head, and of a value head (the same unless given).
    """

    def __init__(self, build: BuildContext, prefix: str, in_features: int, num_heads: int, num_kv_heads: int, head_dim: int, *,
                 value_dim: int | None = None, bias: bool = False) -> None:
        comm, value_dim = build.comm, value_dim or head_dim
        heads, kv_heads = local_heads(num_heads, num_kv_heads, comm.size)
        shards = (("q", num_heads * head_dim), ("k", num_kv_heads * head_dim), ("v", num_kv_heads * value_dim))
        copies = max(1, comm.size // num_kv_heads)
        replicas = (("k", copies), ("v", copies)) if copies > 1 else ()
        super().__init__(build, LinearShape(prefix, in_features, shards, "out", comm.rank, comm.size, replicas), bias=bias)
        self._sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * value_dim]
        self._parts = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim)]

    def forward(self, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """``x [T, in] -> q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv]`` of this rank: strided views of one ``[T, ..]`` product."""
        fused = torch.split(self.product(x, self._bias, ctx), self._sizes, dim=-1)
        q, k, v = (part.view(-1, *heads) for part, heads in zip(fused, self._parts, strict=True))
        return q, k, v


def local_heads(num_heads: int, num_kv_heads: int, size: int) -> tuple[int, int]:
    """Query and kv heads of one rank. Raises `ConfigError` when the tensor-parallel size does not fit them."""
    if num_heads % size:
        raise ConfigError(f"Total number of attention heads ({num_heads}) must be divisible by tensor parallel size ({size})")
    if num_kv_heads % size and size % num_kv_heads:
        raise ConfigError(f"tensor parallel size ({size}) must divide the {num_kv_heads} kv heads or be a multiple of them")
    return num_heads // size, max(1, num_kv_heads // size)
