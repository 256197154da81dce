"""What every layer with checkpoint tensors shares: allocate, load this rank's part, finish."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kvloom.errors import CheckpointError, InternalError
from kvloom.interfaces.quant import MergeRule, ParamSpec
from kvloom.layers.params import ParamPlan, Span, plan_param

ShardSpecs = Mapping[str | None, Mapping[str, ParamSpec]]
"""Shard -> suffix -> spec."""


class LoadableModule(nn.Module):
    """A `LoadableLayer`: a subclass calls `add_params` once in its constructor and reads `tensors`.

    Attributes:
        prefix: checkpoint module prefix of the first shard.
        tensors: suffix -> this rank's tensor, fused; what `finish` returned after `post_load`. Each is also a registered
            parameter (dots in a suffix become underscores).
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix
        self.tensors: dict[str, Tensor] = {}
        self._plans: dict[str, ParamPlan] = {}
        self._loaded: dict[str, set[str | None]] = {}

    def add_params(self, specs: ShardSpecs, inputs: Span, outputs: Mapping[str | None, Span], device: torch.device) -> None:
        """Allocate the parameters of all shards, uninitialised but for padding, which is zero.

        Raises `PluginError` or `ConfigError`, see `plan_param`.
        """
        by_suffix: dict[str, dict[str | None, ParamSpec]] = {}
        for shard, shard_specs in specs.items():
            for suffix, spec in shard_specs.items():
                by_suffix.setdefault(suffix, {})[shard] = spec
        for suffix, suffix_specs in by_suffix.items():
            plan = plan_param(f"{self.prefix}.{suffix}", suffix_specs, inputs, outputs)
            make = torch.zeros if plan.padded else torch.empty
            self._plans[suffix] = plan
            self._loaded[suffix] = set()
            self._register(suffix, make(plan.shape, dtype=dtype_of(plan.dtype), device=device))

    def checkpoint_params(self, shard: str | None) -> Mapping[str, ParamSpec]:
        """See `LoadableLayer`. An unknown shard gives nothing."""
        return {suffix: plan.specs[shard] for suffix, plan in self._plans.items() if shard in plan.specs}

    def load_param(self, suffix: str, shard: str | None, tensor: Tensor) -> None:
        """See `LoadableLayer`. Only this rank's part of a file-backed tensor is read.

        Raises:
            CheckpointError: wrong shape, an integer where a float belongs or the reverse, or shards that had to be equal differ.
        """
        plan = self._plans[suffix]
        source, target = plan.placements[shard]
        self._check(suffix, tensor, plan.specs[shard])
        part, place = tensor[source], self.tensors[suffix].data[target]
        if plan.merge is MergeRule.EQUAL and self._loaded[suffix] and not torch.equal(place, part.to(place)):
            raise CheckpointError(f"{self.prefix}.{suffix}: shard {shard!r} differs from {sorted(map(str, self._loaded[suffix]))}; "
                                  f"these layers are multiplied as one and need the same values")
        place.copy_(part)
        self._loaded[suffix].add(shard)

    def post_load(self) -> None:
        """See `LoadableLayer`.

        Raises:
            CheckpointError: a tensor that is not optional was not loaded, or only some shards of an optional one were.
        """
        kept: dict[str, Tensor] = {}
        for suffix, plan in self._plans.items():
            missing = [shard for shard in plan.specs if shard not in self._loaded[suffix]]
            if not missing:
                kept[suffix] = self.tensors[suffix].data
            elif len(missing) < len(plan.specs) or not all(spec.optional for spec in plan.specs.values()):
                shards = "" if missing == [None] else f" for shards {missing}"
                raise CheckpointError(f"{self.prefix}.{suffix} was not loaded{shards}")
        finished = self.finish(kept)
        for suffix in list(self.tensors):
            delattr(self, _attribute(suffix))
        self.tensors.clear()
        for suffix, tensor in finished.items():
            self._register(suffix, tensor)

    def finish(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn loaded tensors into those that the forward reads. The default keeps them."""
        return tensors

    def _register(self, suffix: str, tensor: Tensor) -> None:
        parameter = nn.Parameter(tensor, requires_grad=False)
        self.register_parameter(_attribute(suffix), parameter)
        self.tensors[suffix] = parameter

    def _check(self, suffix: str, tensor: Tensor, spec: ParamSpec) -> None:
        dtype = dtype_of(spec.dtype)
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{self.prefix}.{suffix}: shape {tuple(tensor.shape)} in the checkpoint, expected {spec.shape}")
        if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
            raise CheckpointError(f"{self.prefix}.{suffix}: dtype {tensor.dtype} in the checkpoint cannot become {dtype}")


def dtype_of(name: str) -> torch.dtype:
    """A torch dtype by its name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InternalError(f"{name!r} is not the name of a torch dtype")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch dtype as contracts and files spell it: ``float32``."""
    return str(dtype).removeprefix("torch.")


def _attribute(suffix: str) -> str:
    """Parameter names of a module may not contain dots."""
    return suffix.replace(".", "_")
