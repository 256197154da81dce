"""Quantization: how a layer's numbers are stored in a checkpoint and multiplied at run time.

A method never knows a model: it sees a layer's shape and answers with data (`ParamSpec`) and a product. A model never knows
a method: it never names ``qzeros``. Sharding and fusing follow from the data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class MergeRule(StrEnum):
    """How the tensors of a fused layer's shards (q, k, v) become one parameter."""

    CONCAT = "concat"  # along out_axis (weights, per-channel and per-group scales)
    STACK = "stack"    # one entry a shard on a new leading axis (per-tensor scales)
    EQUAL = "equal"    # must be the same in every shard and is kept once (g_idx of an unsharded input)


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One tensor that a layer's shard has in the checkpoint.

    Args:
        shape: whole shape of one shard's tensor in the file, before tensor parallelism and fusing.
        dtype: dtype name of the parameter; the loader casts between floating dtypes only.
        in_axis, out_axis: axis that follows the layer's input or output features; None when it follows neither.
        pack_factor: features per element on the packed axis (8 for int4 nibbles in int32).
        pack_axis: which axis is packed; None when ``pack_factor == 1``.
        group: features per element along `in_axis` (group scales), or along both axes for block scales as ``(out, in)``.
        merge: how shards become one parameter.
        optional: the checkpoint may leave it out.
    """

    shape: tuple[int, ...]
    dtype: str
    in_axis: int | None = None
    out_axis: int | None = None
    pack_factor: int = 1
    pack_axis: int | None = None
    group: int | tuple[int, int] | None = None
    merge: MergeRule = MergeRule.CONCAT
    optional: bool = False


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer as a quantization method sees it.

    Args:
        prefix: checkpoint module prefix of the first shard, for methods that exclude modules by name.
        in_features: whole input features.
        shards: ``((shard name or None, whole output features), ...)``, one entry for a layer that is not fused.
        sharded_axis: "in", "out" or None: which features tensor parallelism divides.
        rank, size: of the tensor-parallel group.
        replicas: ``((shard name, how many consecutive ranks hold the same part), ...)`` where a shard has fewer heads than ranks.
    """

    prefix: str
    in_features: int
    shards: tuple[tuple[str | None, int], ...]
    sharded_axis: str | None = None
    rank: int = 0
    size: int = 1
    replicas: tuple[tuple[str | None, int], ...] = ()

    @property
    def local_in_features(self) -> int:
        """Input features on this rank."""
        return self.in_features // self.size if self.sharded_axis == "in" else self.in_features

    def local_out_features(self, shard: str | None) -> int:
        """Output features of one shard on this rank."""
        whole = dict(self.shards)[shard]
        if self.sharded_axis != "out":
            return whole
        return whole * dict(self.replicas).get(shard, 1) // self.size


class LinearMethod(ABC):
    """Product of one linear layer, for which it was made. The layer owns the tensors and passes them in."""

    @abstractmethod
    def params(self, shape: LinearShape, shard: str | None) -> Mapping[str, ParamSpec]:
        """Suffix -> spec of what the checkpoint holds for one shard (without ``bias``, which the layer owns)."""

    def post_load(self, shape: LinearShape, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn the loaded tensors (this rank's, fused) into the ones `apply` reads; the returned ones replace them.

        Original tensors that are not returned are freed.
        """
        return params

    @abstractmethod
    def apply(self, params: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [T, in] -> [T, out]`` in x's dtype; `in` and `out` of this rank, shards side by side."""

    def apply_gated(self, params: Mapping[str, Tensor], x: Tensor, bias: Tensor | None, activation: str) -> Tensor | None:
        """Of a layer whose shards are a gate and what it is multiplied with: ``activation(gate) * up``, ``[T, in] -> [T, out / 2]``.

        None, as here, where the method does not do both at once, or not with this activation: the layer then does it in two steps.
        """
        return None

    @abstractmethod
    def dequantize(self, params: Mapping[str, Tensor]) -> Tensor:
        """The weight ``[out, in]`` that `apply` multiplies with, in floating point, from the `post_load` tensors."""

    @staticmethod
    @abstractmethod
    def dequantize_reference(tensors: Mapping[str, Tensor], spec: Mapping[str, Any]) -> Tensor:
        """The truth: one shard's checkpoint tensors and the ``quantization_config`` -> float32 ``[out, in]`` in plain torch."""


class EmbeddingMethod(ABC):
    """Lookup of one embedding table; also the product of a tied or untied output head. Made for one layer."""

    @abstractmethod
    def params(self, rows: int, width: int) -> Mapping[str, ParamSpec]:
        """Suffix -> spec; ``out_axis`` is the vocabulary."""

    def post_load(self, params: dict[str, Tensor], *, is_head: bool) -> dict[str, Tensor]:
        """As `LinearMethod.post_load`. `is_head`: `logits` will be called, maybe beside `lookup`."""
        return params

    @abstractmethod
    def lookup(self, params: Mapping[str, Tensor], token_ids: Tensor) -> Tensor:
        """``[T] -> [T, width]``; ids outside this rank's rows were already masked to 0 by the layer."""

    @abstractmethod
    def logits(self, params: Mapping[str, Tensor], hidden: Tensor, bias: Tensor | None) -> Tensor:
        """``[R, width] -> [R, rows]``, in hidden's dtype or in float32."""


class ExpertsMethod(ABC):
    """All experts of one mixture layer."""

    @abstractmethod
    def params(self, num_experts: int, hidden: int, intermediate: int, shard: str) -> Mapping[str, ParamSpec]:
        """Suffix -> spec of one expert's ``gate``, ``up`` or ``down``."""

    @abstractmethod
    def apply(self, params: Mapping[str, Tensor], x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """``x [T, H]``, ``expert_ids [T, K]`` int64, ``weights [T, K]`` -> ``[T, H]``, weighted sum over each token's experts."""


class CacheMethod(ABC):
    """Scales of a quantized KV cache that come with the checkpoint."""

    @abstractmethod
    def params(self, num_kv_heads: int) -> Mapping[str, ParamSpec]:
        """Suffix -> spec of what an attention module holds (``k_scale``, ``v_scale``)."""

    @abstractmethod
    def scales(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``(k_scale, v_scale)`` float32, scalar or ``[Hk]``."""


class QuantMethod(ABC):
    """One ``quant_method`` of config.json. Registered with ``kvloom_register_quantizations``.

    The constructor takes ``quantization_config`` (a dict, ``{}`` for the plain method) and raises `ConfigError` for
    settings it cannot serve. Each ``for_*`` answers with a method, or None for "not this layer": the plain method serves it.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    @classmethod
    def supports(cls, dtype: torch.dtype, device: torch.device) -> str | None:
        """None when this method can run with these activations; else the reason why not."""
        return None

    @classmethod
    def row_invariant(cls, dtype: torch.dtype, device: torch.device) -> str | None:
        """None when its products give a row the same bits whatever other rows there are; else the reason why not, as a phrase."""
        return "it does not say that a row's products are the same whatever the other rows"

    @abstractmethod
    def for_linear(self, shape: LinearShape, dtype: torch.dtype) -> LinearMethod | None:
        """The product of a linear layer."""

    def for_embedding(self, prefix: str, dtype: torch.dtype) -> EmbeddingMethod | None:
        """The lookup of an embedding table or the product of an output head."""
        return None

    def for_experts(self, prefix: str, dtype: torch.dtype) -> ExpertsMethod | None:
        """The experts of a mixture layer."""
        return None

    def for_cache(self, prefix: str) -> CacheMethod | None:
        """The KV cache scales of an attention layer."""
        return None
