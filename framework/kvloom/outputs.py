"""What a request gives back. Field names and meanings are vLLM's. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Logprob:
    """One candidate: natural-log probability, rank (1 = best), text of the token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request in seconds on ``time.monotonic()``, and what the scheduler did to it. Always set.

    Args:
        arrival_time: admitted.
        first_scheduled_time, first_token_time, last_token_time, finished_time: None until it happened.
        time_in_queue: first_scheduled_time - arrival_time.
        num_cached_tokens: prompt tokens taken from the prefix cache at the first scheduling.
        num_preemptions: how often it had to give way.
        num_recomputed_tokens: tokens computed again after that.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    time_in_queue: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence.

    Args:
        index: 0..n-1 within the request.
        text: without the prompt; empty with ``detokenize=False`` or without a tokenizer.
        token_ids: without the prompt, the stop token included.
        cumulative_logprob, logprobs: None unless logprobs were asked for.
        finish_reason: "stop", "length", "abort", "error", or None while it runs.
        stop_reason: the stop string or stop token id; None for the end-of-text token.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None

    def finished(self) -> bool:
        """Whether it will grow no more."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """One request's result, in the order of the prompts.

    Args:
        request_id: "0", "1", ... over the life of the `LLM`.
        prompt: its text; None for token prompts.
        prompt_token_ids: as computed, with whatever the tokenizer added.
        prompt_logprobs: None unless asked for; item 0 is None.
        outputs: one a generated sequence.
        finished: True for everything that `LLM` returns.
        metrics: see `RequestMetrics`.
        num_cached_tokens: prompt tokens taken from the prefix cache, a multiple of the block size.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    lora_request: Any = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    multi_modal_placeholders: dict[str, Any] = field(default_factory=dict)
