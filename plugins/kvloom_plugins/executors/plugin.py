"""Registers the built-in executors."""

from __future__ import annotations

from kvloom import hookimpl
from kvloom.interfaces import Registrar

KVLOOM_API = {"executors": 0}


@hookimpl
def kvloom_register_executors(registry: Registrar) -> None:
    """One worker in this process."""
    registry.add("uni", "kvloom_plugins.executors.in_process:InProcessExecutor")
