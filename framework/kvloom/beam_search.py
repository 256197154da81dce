"""What `LLM.beam_search` does: requests with a decoder in, `BeamSearchOutput`s out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from kvloom.beam_outputs import BeamSearchOutput, BeamSearchSequence
from kvloom.decoding import Decoding
from kvloom.interfaces import Tokenizer
from kvloom.live_request import Call
from kvloom.outputs import CompletionOutput, RequestOutput
from kvloom.param_checks import check_int
from kvloom.params import BeamSearchParams
from kvloom.progress import Progress, check_bar
from kvloom.request_arguments import OnError
from kvloom.running import RunningEngine


def search(engine: RunningEngine, items: Sequence[Any], decoding: Decoding, priorities: Sequence[int],
           use_tqdm: bool | Callable[..., Any], concurrency_limit: int | None, on_error: OnError) -> list[BeamSearchOutput]:
    """See `LLM.beam_search`. On any exception nothing of it stays in the engine."""
    check_bar(use_tqdm)
    decoding.check()
    limit = len(items) if concurrency_limit is None else check_int("concurrency_limit", concurrency_limit, 1)
    return_errors = on_error == "return"
    call, outputs = Call(), dict[int, BeamSearchOutput]()
    waiting = iter(range(len(items)))
    try:
        if limit < len(items) and not return_errors:
            engine.check(items, [decoding] * len(items), priorities)
        with Progress(len(items), use_tqdm) as progress:
            while True:
                for place, output in call.take():
                    if output.error is not None and not return_errors:
                        raise output.error
                    outputs[place] = beam_output(output, decoding.params, engine.tokenizer)
                    progress.finished(output)
                # All prompts that have room come at once: checked together, and queued only if all are sound.
                if places := list(islice(waiting, limit - call.num_open)):
                    engine.submit(call, [items[i] for i in places], [decoding] * len(places), [priorities[i] for i in places],
                                  return_errors=return_errors, first_place=places[0])
                elif call.num_unfinished:
                    engine.step(call)
                elif not call.num_open:
                    break
    finally:
        engine.abort(call)
    return [outputs[place] for place in range(len(items))]


def beam_output(output: RequestOutput, params: Any, tokenizer: Tokenizer | None) -> BeamSearchOutput:
    """The sequences of a request that ended, best first; none of one that failed."""
    if output.error is not None:
        return BeamSearchOutput([], output.error)
    return BeamSearchOutput([_sequence(output.prompt_token_ids, done, params, tokenizer) for done in output.outputs])


def _sequence(prompt_token_ids: Sequence[int], done: CompletionOutput, params: Any, tokenizer: Tokenizer | None) -> BeamSearchSequence:
    tokens = [*prompt_token_ids, *done.token_ids]
    text = "" if tokenizer is None else _text(tokenizer, tokens, params, ended=done.finish_reason == "stop")
    return BeamSearchSequence(tokens, done.logprobs or [], done.cumulative_logprob or 0.0, text)


def _text(tokenizer: Tokenizer, tokens: list[int], params: Any, *, ended: bool) -> str:
    """Of all tokens; a final end token's only where it is asked for. Decoders with parameters of their own get what is usual."""
    if not isinstance(params, BeamSearchParams):
        return tokenizer.decode(tokens)
    skip = params.skip_special_tokens
    if not ended:
        return tokenizer.decode(tokens, skip_special_tokens=skip)
    text = tokenizer.decode(tokens[:-1], skip_special_tokens=skip)
    return text + tokenizer.decode(tokens[-1:], skip_special_tokens=False) if params.include_stop_str_in_output else text
