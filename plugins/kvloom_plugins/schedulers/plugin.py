"""Registers the built-in scheduling policies."""

from __future__ import annotations

from kvloom import hookimpl
from kvloom.interfaces import Registrar

KVLOOM_API = {"schedulers": 0}


@hookimpl
def kvloom_register_schedulers(registry: Registrar) -> None:
    """First come first served, and by the priority that the caller gave."""
    registry.add("fcfs", "kvloom_plugins.schedulers.fcfs:FirstComePolicy")
    registry.add("priority", "kvloom_plugins.schedulers.priority:PriorityPolicy")
