"""Weights that live on the host and are on the device only while they are needed: ``cpu_offload_gb``, and level 1 of sleep.

Where the device is the host itself (a CPU) there is nothing to move, and none of this is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kvloom.interfaces import Model
from kvloom.layers.linear import LinearLayer
from kvloom.runtime.host_blocks import host_empty


class HostWeights:
    """Parameters whose data are on the host. Between `drop` and `fetch` they are empty.

    Args:
        parameters: moved to the host here, and dropped.
        device: where `fetch` puts them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._device = device
        self._kept = [(p, host_empty(tuple(p.shape), p).copy_(p.data)) for p in parameters]
        self.drop()

    @property
    def size_bytes(self) -> int:
        """What they take on the host."""
        return sum(kept.nbytes for _, kept in self._kept)

    def fetch(self) -> None:
        """Copy them to the device."""
        for parameter, kept in self._kept:
            parameter.data = torch.empty_like(kept, device=self._device).copy_(kept, non_blocking=True)

    def drop(self) -> None:
        """Give the device's memory back."""
        for parameter, kept in self._kept:
            parameter.data = torch.empty(0, dtype=kept.dtype, device=self._device)


def layers_to_offload(model: Model, size_bytes: int) -> list[LinearLayer]:
    """Linear layers with at least `size_bytes` of weights, or all there are. The last ones: the first are needed at once.

    Works on the meta device too. Embeddings and norms stay: they are small, or read a few rows at a time.
    """
    layers = {id(t.layer): t.layer for t in model.module_map().values() if isinstance(t.layer, LinearLayer)}
    chosen: list[LinearLayer] = []
    for layer in reversed(layers.values()):
        if weights_bytes(chosen) >= size_bytes:
            break
        chosen.append(layer)
    return chosen


def weights_of(model: Model) -> list[nn.Parameter]:
    """What was loaded into the model and is on the device, each once."""
    layers = (target.layer for target in model.module_map().values())
    return list({id(p): p for layer in layers if isinstance(layer, nn.Module) for p in layer.parameters() if p.numel()}.values())


def weights_bytes(layers: Iterable[nn.Module]) -> int:
    """Bytes of all parameters of these layers."""
    return sum(p.nbytes for layer in layers for p in layer.parameters())


def offload(layers: Iterable[LinearLayer], device: torch.device) -> int:
    """Leave the weights of loaded layers on the host, and copy them to the device around each forward. Returns their bytes."""
    return sum(_offload(layer, device) for layer in layers)


def _offload(layer: LinearLayer, device: torch.device) -> int:
    weights = HostWeights(layer.parameters(), device)

    def fetch(_module: nn.Module, _inputs: Any) -> None:
        weights.fetch()

    def drop(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        weights.drop()

    layer.register_forward_pre_hook(fetch)
    layer.register_forward_hook(drop, always_call=True)
    return weights.size_bytes
