"""Registers the built-in weight loaders."""

from __future__ import annotations

from kvloom import hookimpl
from kvloom.interfaces import Registrar

KVLOOM_API = {"loaders": 0}


@hookimpl
def kvloom_register_loaders(registry: Registrar) -> None:
    """safetensors files, also under "auto"; numbers that are made up, for tests and benchmarks of speed."""
    registry.add("auto", "kvloom_plugins.loaders.safetensors_loader:SafetensorsLoader")
    registry.add("safetensors", "kvloom_plugins.loaders.safetensors_loader:SafetensorsLoader")
    registry.add("dummy", "kvloom_plugins.loaders.dummy:DummyLoader")
