"""Scores of pairs of texts."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from kvloom.calls import run
from kvloom.errors import RequestValidationError
from kvloom.params import PoolingParams
from kvloom.pooling_outputs import PoolingOutput, PoolingRequestOutput, ScoringOutput, ScoringRequestOutput
from kvloom.progress import MakeBar
from kvloom.prompts import LazyPrompt, ParsedPrompt, Truncation, check_token_ids, parse_prompt, split_prompts
from kvloom.request_arguments import OnError
from kvloom.running import RunningEngine


class Pairs(NamedTuple):
    """What `LLM.score` was given: prompts in any form, one of `first` for all of `second` or one each; `cut`: how long ones are cut."""

    first: list[Any]
    second: list[Any]
    cut: Truncation | None

    def each_first(self, items: list[Any]) -> list[Any]:
        """What belongs to `first`, once a pair."""
        return items * len(self.second) if len(self.first) == 1 else items


def paired(text_1: Any, text_2: Any, cut: Truncation | None) -> Pairs:
    """Pairs from `LLM.score`'s arguments; each prompt is read when its request is admitted.

    Raises:
        RequestValidationError: no texts, or numbers that do not fit.
        RequestTypeError: something that holds no prompts.
    """
    first, second = split_prompts(text_1), split_prompts(text_2)
    for texts, name, what in ((first, "text_1", "text"), (second, "text_2", "text_pair")):
        if not texts:
            raise RequestValidationError(f"At least one {what} element must be given", name, texts)
    if len(first) not in (1, len(second)):
        raise RequestValidationError(f"Input lengths must be either 1:1, 1:N or N:N; got {len(first)}:{len(second)}", "text_1",
                                     len(first))
    return Pairs(first, second, cut)


def check_one_label(engine: RunningEngine) -> None:
    """Raises `RequestValidationError` where a pair would get several scores."""
    labels = engine.rules.need_pooling("score").poolers.plan.num_labels
    if labels is not None and labels != 1:
        raise RequestValidationError(f"Score API needs a model with one label, this one has {labels}; use classify", "task", labels)


def score_pairs(engine: RunningEngine, pairs: Pairs, params: PoolingParams, priorities: Sequence[int], use_tqdm: bool | MakeBar,
                on_error: OnError) -> list[PoolingRequestOutput[PoolingOutput]]:
    """By a cross-encoder, which reads both texts as one prompt."""
    items = [LazyPrompt(functools.partial(_pair, engine, a, b, pairs.cut))
             for a, b in zip(pairs.each_first(pairs.first), pairs.second, strict=True)]
    return run(engine, items, [params] * len(items), priorities, use_tqdm, on_error)


def score_embeddings(engine: RunningEngine, pairs: Pairs, params: PoolingParams, priorities: Sequence[int], use_tqdm: bool | MakeBar,
                     on_error: OnError) -> list[ScoringRequestOutput]:
    """By the cosine of both texts' embeddings; one text for all pairs is computed once."""
    prompts = [*pairs.first, *pairs.second]
    items = [LazyPrompt(functools.partial(_text, engine, p, pairs.cut)) for p in prompts]
    own = [min(priorities)] if len(pairs.first) == 1 else priorities
    outputs = run(engine, items, [params] * len(items), [*own, *priorities], use_tqdm, on_error)
    first, second = pairs.each_first(outputs[:len(pairs.first)]), outputs[len(pairs.first):]
    padding = engine.tokenizer.pad_token_id if engine.tokenizer is not None else None
    return [_cosine(a, b, [] if padding is None else [padding]) for a, b in zip(first, second, strict=True)]


def _pair(engine: RunningEngine, first: Any, second: Any, cut: Truncation | None) -> ParsedPrompt:
    a, b = (_text(engine, p, None) for p in (first, second))
    salts = dict.fromkeys(s for s in (a.cache_salt, b.cache_salt) if s)
    return replace(engine.rules.encode_pair(a.text or "", b.text or "", cut), cache_salt="\n".join(salts))


def _text(engine: RunningEngine, prompt: Any, cut: Truncation | None) -> ParsedPrompt:
    """A prompt as text; of token ids what they say.

    Raises:
        RequestValidationError, RequestTypeError: it is none, or token ids cannot be read.
    """
    parsed = parse_prompt(prompt)
    if parsed.extras:
        raise RequestValidationError(f"{', '.join(parsed.extras)} cannot be given to score, which makes its own; give "
                                     "classify or embed prompt_token_ids with them", next(iter(parsed.extras)))
    text, token_ids = parsed.text, parsed.token_ids
    if text is None:
        check_token_ids(token_ids or (), engine.rules.vocab_size)
        tokenizer = engine.rules.need_tokenizer("score, which reads the text of token ids,", "prompt", "call embed or classify")
        text = engine.rules.guarded(lambda: tokenizer.decode(token_ids or ()))
    return ParsedPrompt(text, None, parsed.cache_salt, cut)


def _cosine(a: PoolingRequestOutput[Any], b: PoolingRequestOutput[Any], padding: list[int]) -> ScoringRequestOutput:
    error = a.error or b.error
    outputs: Any = None if error is not None else ScoringOutput(cosine(a.outputs.data.tolist(), b.outputs.data.tolist()))
    return ScoringRequestOutput(f"{a.request_id}_{b.request_id}", outputs, [*a.prompt_token_ids, *padding, *b.prompt_token_ids], True,
                                a.num_cached_tokens + b.num_cached_tokens, error, b.metrics)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two vectors of one length; 0 where one of them is 0."""
    lengths = math.hypot(*a) * math.hypot(*b)
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0
