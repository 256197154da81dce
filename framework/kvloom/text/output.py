"""From sequences that ended to what callers get."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvloom.core import BranchGroup, Finish, Request
from kvloom.errors import KvloomError
from kvloom.interfaces.step import TokenLogprob
from kvloom.interfaces.tokenizer import Tokenizer
from kvloom.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from kvloom.params import SamplingParams
from kvloom.text.detokenizer import Detokenizer
from kvloom.text.sequence_text import stopped_by_token

if TYPE_CHECKING:
    from kvloom.live_request import LiveRequest, LiveSequence

TokenText = Callable[[int], str | None]


def request_output(live: LiveRequest, tokenizer: Tokenizer | None, error: KvloomError | None) -> RequestOutput:
    """The output of a request that is over: with an error, what there was until then.

    Raises:
        Exception: whatever the tokenizer raises; only this request is affected.
    """
    first = live.sequences[0].request
    sampling = first.spec.generation
    named = tokenizer.token_text if tokenizer is not None and sampling.detokenize else _no_text
    metrics = RequestMetrics.of([s.request.metrics for s in live.sequences])
    if first.group is None:
        completions = [_completion(s, tokenizer, named) for s in live.sequences]
    else:
        completions = _results(first, first.group, tokenizer, named)
        metrics.num_generation_tokens = sum(len(c.token_ids) for c in completions)
    if sampling.num_sequences > sampling.n and error is None:
        completions = _best(completions, sampling.n)
    if sampling.logprobs is None:
        for completion in completions:
            completion.cumulative_logprob = completion.logprobs = None
    return RequestOutput(
        request_id=live.request_id,
        prompt=live.prompt,
        prompt_token_ids=list(first.spec.prompt_token_ids),
        prompt_logprobs=None if sampling.prompt_logprobs is None else [None, *(_by_id(c, named) for c in first.prompt_logprobs)],
        outputs=completions,
        finished=True,
        metrics=metrics,
        num_cached_tokens=first.metrics.num_cached_tokens,
        error=error,
    )


def request_refusal(live: LiveRequest, error: KvloomError) -> RequestOutput:
    """The output of a request that has none."""
    now_s = time.monotonic()
    metrics = RequestMetrics(now_s, finished_time=now_s)
    token_ids = list(live.sequences[0].request.spec.prompt_token_ids) if live.sequences else []
    return RequestOutput(live.request_id, live.prompt, token_ids, None, [], True, metrics, error=error)


def _completion(sequence: LiveSequence, tokenizer: Tokenizer | None, named: TokenText) -> CompletionOutput:
    request = sequence.request
    text = output_text(request, tokenizer) if sequence.text is None else sequence.text.text
    finish = request.finish
    if finish is not None and finish.reason in ("stop", "length") and sequence.text is not None and sequence.text.found is not None:
        finish = Finish("stop", sequence.text.found)
    return CompletionOutput(
        index=request.spec.sample_index,
        text=text,
        token_ids=request.output_token_ids,
        cumulative_logprob=sum(candidates[0].logprob for candidates in request.logprobs),
        logprobs=[_by_id(candidates, named) for candidates in request.logprobs],
        finish_reason=None if finish is None else finish.reason,
        stop_reason=None if finish is None else finish.stop_reason,
    )


def _results(root: Request, group: BranchGroup, tokenizer: Tokenizer | None, named: TokenText) -> list[CompletionOutput]:
    """Of a branching request: what finished, best first; its last token's text included, whatever it is."""
    prompt = root.spec.prompt_token_ids
    return [CompletionOutput(
        index=index,
        text="" if tokenizer is None else _decoded(tokenizer, prompt, ended.token_ids, root.spec.generation),
        token_ids=list(ended.token_ids),
        cumulative_logprob=ended.cumulative_logprob,
        logprobs=[_by_id(candidates, named) for candidates in ended.logprobs],
        finish_reason=ended.reason,
    ) for index, ended in enumerate(group.results)]


def _best(completions: Sequence[CompletionOutput], n: int) -> list[CompletionOutput]:
    """The `n` with the largest cumulative log-probability, best first, with new indices."""
    best = sorted(completions, key=lambda c: -(c.cumulative_logprob or 0.0))[:n]
    for index, completion in enumerate(best):
        completion.index = index
    return best


def _by_id(candidates: Sequence[TokenLogprob], named: TokenText) -> dict[int, Logprob]:
    return {c.token_id: Logprob(c.logprob, c.rank, named(c.token_id)) for c in candidates}


def _no_text(token_id: int) -> str | None:
    return None


def output_text(request: Request, tokenizer: Tokenizer | None) -> str:
    """The output's text without its stop token, unless asked for; empty where no text is wanted."""
    sampling = request.spec.generation
    if tokenizer is None or not sampling.detokenize:
        return ""
    token_ids = request.output_token_ids
    if stopped_by_token(request) and not sampling.include_stop_str_in_output:
        token_ids = token_ids[:-1]
    return _decoded(tokenizer, request.spec.prompt_token_ids, token_ids, sampling)


def _decoded(tokenizer: Tokenizer, prompt_token_ids: Sequence[int], token_ids: Sequence[int], sampling: SamplingParams) -> str:
    text = Detokenizer(tokenizer, prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens,
                       spaces_between_special_tokens=sampling.spaces_between_special_tokens)
    return text.add(token_ids) + text.finish()
