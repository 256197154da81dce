"""Registers the built-in tokenizers. Imports no transformers."""

from __future__ import annotations

from kvloom import hookimpl
from kvloom.interfaces import Registrar

KVLOOM_API = {"tokenizers": 0}


@hookimpl
def kvloom_register_tokenizers(registry: Registrar) -> None:
    """transformers' tokenizers: whichever implementation it has, only one in Rust, or only one in Python."""
    registry.add("auto", "kvloom_plugins.tokenizers.hf:AutoTokenizer")
    registry.add("fast", "kvloom_plugins.tokenizers.hf:FastTokenizer")
    registry.add("slow", "kvloom_plugins.tokenizers.hf:SlowTokenizer")
