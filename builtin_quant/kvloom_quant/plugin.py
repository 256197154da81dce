"""Registers our quantization methods. Imports no torch."""

from __future__ import annotations

from kvloom import hookimpl
from kvloom.interfaces.registrar import Registrar

KVLOOM_API = {"quantizations": 0}


@hookimpl
def kvloom_register_quantizations(registry: Registrar) -> None:
    """Names are those of ``quantization_config.quant_method``; "none" is a checkpoint without that section."""
    registry.add("none", "kvloom_quant.unquantized:Unquantized")
