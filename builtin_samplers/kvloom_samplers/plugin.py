"""Registers the built-in samplers, decoders and logits processors. Imports no torch."""

from __future__ import annotations

from kvloom import hookimpl
from kvloom.interfaces.registrar import Registrar

KVLOOM_API = {"samplers": 0, "decoders": 0, "logits_processors": 0}


@hookimpl
def kvloom_register_samplers(registry: Registrar) -> None:
    """Greedy, and by probability."""
    registry.add("default", "kvloom_samplers.token_sampler:TokenSampler")


@hookimpl
def kvloom_register_decoders(registry: Registrar) -> None:
    """Beam search."""
    registry.add("beam_search", "kvloom_samplers.beam_search:BeamSearch")


@hookimpl
def kvloom_register_logits_processors(registry: Registrar) -> None:
    """Those that `SamplingParams` has fields for; each looks for its own."""
    for name, target in (
        ("allowed_token_ids", "bias:AllowedTokens"), ("bad_words", "bad_words:BadWords"), ("min_tokens", "bias:MinTokens"),
        ("logit_bias", "bias:LogitBias"), ("functions", "functions:Functions"), ("penalties", "penalties:Penalties"),
        ("temperature", "filters:Temperature"), ("min_p", "filters:MinP"),
        ("top_k", "filters:TopK"), ("top_p", "filters:TopP"),
    ):
        registry.add(name, f"kvloom_samplers.{target}")
