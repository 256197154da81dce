"""Registers the built-in poolers. Imports no torch."""

from __future__ import annotations

from kvloom import hookimpl
from kvloom.interfaces import Registrar

KVLOOM_API = {"poolers": 0}


@hookimpl
def kvloom_register_poolers(registry: Registrar) -> None:
    """One row of the last token, of the first, or the mean; or a row for every token, or for every one of a kind."""
    registry.add("LAST", "kvloom_plugins.poolers.last:LastPooler")
    registry.add("CLS", "kvloom_plugins.poolers.cls:FirstPooler")
    registry.add("MEAN", "kvloom_plugins.poolers.mean:MeanPooler")
    registry.add("ALL", "kvloom_plugins.poolers.every:EveryTokenPooler")
    registry.add("STEP", "kvloom_plugins.poolers.step:StepPooler")
