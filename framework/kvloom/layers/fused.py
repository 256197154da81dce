"""Checkpoint tensors that hold several shards of a fused layer one after the other (a ``Wqkv``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from kvloom.errors import PluginError
from kvloom.interfaces.quant import ParamSpec
from kvloom.layers.base import LoadableModule


class FusedShards:
    """A `LoadableLayer` that cuts such tensors along their output features and gives the parts to the layer's shards.

    Args:
        layer: what is loaded.
        shards: its shards in the tensors' order.
    """

    def __init__(self, layer: LoadableModule, shards: Sequence[str]) -> None:
        self._layer, self._shards = layer, tuple(shards)

    def checkpoint_params(self, shard: str | None) -> Mapping[str, ParamSpec]:
        """See `LoadableLayer`: the whole tensors, under no shard's name.

        Raises:
            PluginError: a tensor that does not follow the output features, so that it cannot be cut.
        """
        found: dict[str, ParamSpec] = {}
        for suffix, spec in self._layer.checkpoint_params(self._shards[0]).items():
            axis = self._axis(suffix, spec)
            elements = sum(self._layer.checkpoint_params(s)[suffix].shape[axis] for s in self._shards)
            found[suffix] = replace(spec, shape=(*spec.shape[:axis], elements, *spec.shape[axis + 1:]))
        return found

    def load_param(self, suffix: str, shard: str | None, tensor: Tensor) -> None:
        """See `LoadableLayer`."""
        start = 0
        for name in self._shards:
            spec = self._layer.checkpoint_params(name)[suffix]
            axis = self._axis(suffix, spec)
            self._layer.load_param(suffix, name, tensor.narrow(axis, start, spec.shape[axis]))
            start += spec.shape[axis]

    def post_load(self) -> None:
        """See `LoadableLayer`."""
        self._layer.post_load()

    def _axis(self, suffix: str, spec: ParamSpec) -> int:
        if spec.out_axis is None:
            raise PluginError(f"{self._layer.prefix}.{suffix} holds the shards {list(self._shards)} in one tensor, but {spec} has no "
                              "out_axis along which it could be cut")
        return spec.out_axis
