"""What a request gives back. Field names and meanings are vLLM's. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvloom.errors import KvloomError


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
        num_generation_tokens: output tokens of all its completions.
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
    num_generation_tokens: int = 0

    @property
    def time_in_prefill(self) -> float | None:
        """From the first scheduling to the first token."""
        return _between(self.first_scheduled_time, self.first_token_time)

    @property
    def first_token_latency(self) -> float | None:
        """From the arrival to the first token."""
        return _between(self.arrival_time, self.first_token_time)

    @classmethod
    def of(cls, sequences: Sequence[RequestMetrics]) -> RequestMetrics:
        """Those of a request from those of its sequences: the first one's beginning, the last one's end, and sums."""
        first = sequences[0]
        return cls(
            first.arrival_time, first.first_scheduled_time,
            min((m.first_token_time for m in sequences if m.first_token_time is not None), default=None),
            max((m.last_token_time for m in sequences if m.last_token_time is not None), default=None),
            max((m.finished_time for m in sequences if m.finished_time is not None), default=None),
            first.time_in_queue, first.num_cached_tokens,
            sum(m.num_preemptions for m in sequences), sum(m.num_recomputed_tokens for m in sequences),
            sum(m.num_generation_tokens for m in sequences),
        )


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


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

    def append(self, delta: CompletionOutput) -> None:
        """Take over what came after it."""
        self.text += delta.text
        self.token_ids = [*self.token_ids, *delta.token_ids]
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *delta.logprobs]
        if delta.cumulative_logprob is not None:
            self.cumulative_logprob = delta.cumulative_logprob
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


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
        lora_request, encoder_prompt, encoder_prompt_token_ids, multi_modal_placeholders: of requests that have such things.
        error: why it failed, with ``on_error="return"``; `outputs` then holds what there was.
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
    error: KvloomError | None = None

    def add(self, next_output: RequestOutput, aggregate: bool = True) -> None:
        """Take a later output of the same request over, by completion index.

        Args:
            aggregate: its completions hold what is new (DELTA) and are appended; False: they replace those of the same index.
        """
        self.finished |= next_output.finished
        self.metrics, self.error = next_output.metrics, next_output.error or self.error
        ours = {c.index: place for place, c in enumerate(self.outputs)}
        for theirs in next_output.outputs:
            place = ours.get(theirs.index)
            if place is None:
                self.outputs.append(theirs)
            elif aggregate:
                self.outputs[place].append(theirs)
            else:
                self.outputs[place] = theirs
