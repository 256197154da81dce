"""kvloom: a plugin-first LLM inference engine.

Importing it imports no torch and loads no plugin; the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvloom.beam_outputs import BeamSearchOutput, BeamSearchSequence
    from kvloom.config.pooler import PoolerConfig
    from kvloom.hooks.markers import hookimpl
    from kvloom.llm import LLM
    from kvloom.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from kvloom.params import BeamSearchParams, PoolingParams, RequestOutputKind, SamplingParams
    from kvloom.pooling_outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from kvloom.prompts import TextPrompt, TokensPrompt
    from kvloom.structured_outputs import GuidedDecodingParams, StructuredOutputsParams

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "GuidedDecodingParams",
    "Logprob",
    "PoolerConfig",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
    "hookimpl",
]

__version__ = "0.1.0"

_HOME = {
    "PoolerConfig": "kvloom.config.pooler",
    "ClassificationOutput": "kvloom.pooling_outputs",
    "ClassificationRequestOutput": "kvloom.pooling_outputs",
    "EmbeddingOutput": "kvloom.pooling_outputs",
    "EmbeddingRequestOutput": "kvloom.pooling_outputs",
    "PoolingOutput": "kvloom.pooling_outputs",
    "PoolingRequestOutput": "kvloom.pooling_outputs",
    "ScoringOutput": "kvloom.pooling_outputs",
    "ScoringRequestOutput": "kvloom.pooling_outputs",
    "LLM": "kvloom.llm",
    "BeamSearchOutput": "kvloom.beam_outputs",
    "BeamSearchParams": "kvloom.params",
    "BeamSearchSequence": "kvloom.beam_outputs",
    "CompletionOutput": "kvloom.outputs",
    "Logprob": "kvloom.outputs",
    "RequestMetrics": "kvloom.outputs",
    "RequestOutput": "kvloom.outputs",
    "PoolingParams": "kvloom.params",
    "RequestOutputKind": "kvloom.params",
    "SamplingParams": "kvloom.params",
    "TextPrompt": "kvloom.prompts",
    "TokensPrompt": "kvloom.prompts",
    "GuidedDecodingParams": "kvloom.structured_outputs",
    "StructuredOutputsParams": "kvloom.structured_outputs",
    "hookimpl": "kvloom.hooks.markers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
