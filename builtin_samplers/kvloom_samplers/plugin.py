"""Registers the built-in samplers. Imports no torch."""

from __future__ import annotations

from kvloom import hookimpl
from kvloom.interfaces.registrar import Registrar

KVLOOM_API = {"samplers": 0}


@hookimpl
def kvloom_register_samplers(registry: Registrar) -> None:
    """Greedy, and by temperature."""
    registry.add("default", "kvloom_samplers.token_sampler:TokenSampler")
