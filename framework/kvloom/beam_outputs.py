"""What beam search gives back. Field names and meanings are vLLM's. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvloom.errors import KvloomError
from kvloom.outputs import Logprob


@dataclass
class BeamSearchSequence:
    """One beam.

    Args:
        tokens: the prompt's and the generated ones, a final end token included.
        logprobs: candidates of each generated token.
        cum_logprob: sum of the generated tokens' log-probabilities, that of a final end token included.
        text: of all `tokens`, the prompt's too; None while it grows.
        finish_reason, stop_reason: None, as in vLLM.
        multi_modal_data, mm_processor_kwargs, lora_request: of prompts that have such things.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    multi_modal_data: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    lora_request: Any = None


@dataclass
class BeamSearchOutput:
    """The best beams of one prompt.

    Args:
        sequences: best first.
        error: why the request failed, with ``on_error="return"``; there are no sequences then.
    """

    sequences: list[BeamSearchSequence]
    error: KvloomError | None = None
