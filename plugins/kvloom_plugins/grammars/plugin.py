"""Registers the built-in grammar backend. Imports no llguidance."""

from __future__ import annotations

from kvloom import hookimpl
from kvloom.interfaces import Registrar
from kvloom_kernels.requirement import Requirement

KVLOOM_API = {"grammars": 0}


@hookimpl
def kvloom_register_grammars(registry: Registrar) -> None:
    """llguidance, under the name that vLLM's users know it by."""
    registry.add("guidance", "kvloom_plugins.grammars.guidance:Guidance", needs=Requirement(packages=("llguidance",)))
