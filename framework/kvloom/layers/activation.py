"""Activations of MLP layers, by their config.json names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor
from torch.nn import functional

from kvloom.errors import ConfigError
from kvloom_kernels.activation import silu_mul

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "relu": functional.relu,
})


def activation(name: str) -> Activation:
    """The elementwise function that config.json calls `name`. Raises `ConfigError` with the known names."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}; known are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def gated(function: Activation, gate_up: Tensor) -> Tensor:
    """``gate_up [T, 2 * I] -> function(gate) * up [T, I]``: what follows a `GateUpLinear`."""
    if function is functional.silu:
        return silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return function(gate) * up
