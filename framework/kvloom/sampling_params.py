"""Parameters of a request, by the module's name that vLLM's users know."""

from __future__ import annotations

from kvloom.params import RequestOutputKind, SamplingParams
from kvloom.structured_outputs import GuidedDecodingParams, StructuredOutputsParams

__all__ = ["GuidedDecodingParams", "RequestOutputKind", "SamplingParams", "StructuredOutputsParams"]
