"""Scores of pairs of texts."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from kvloom.calls import run
from kvloom.errors import RequestValidationError
from kvloom.params import PoolingParams
from kvloom.pooling_outputs import PoolingOutput, PoolingRequestOutput, ScoringOutput, ScoringRequestOutput
from kvloom.progress import MakeBar
from kvloom.prompts import LazyPrompt, check_token_ids, parse_prompt, split_prompts
from kvloom.request_arguments import OnError
from kvloom.running import RunningEngine

Pairs = list[tuple[str, str]]


def paired(engine: RunningEngine, text_1: Any, text_2: Any) -> Pairs:
    """Pairs of texts from `LLM.score`'s arguments.

    Raises:
        RequestValidationError: no texts, or numbers that do not fit.
        RequestTypeError: something that is no text.
    """
    first, second = ([_text(engine, p) for p in split_prompts(given)] for given in (text_1, text_2))
    for texts, name, what in ((first, "text_1", "text"), (second, "text_2", "text_pair")):
        if not texts:
            raise RequestValidationError(f"At least one {what} element must be given", name, texts)
    if len(first) not in (1, len(second)):
        raise RequestValidationError(f"Input lengths must be either 1:1, 1:N or N:N; got {len(first)}:{len(second)}", "text_1",
                                     len(first))
    return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))


def _text(engine: RunningEngine, prompt: Any) -> str:
    """A prompt's text; of token ids what they say."""
    parsed = parse_prompt(prompt)
    if parsed.text is not None or parsed.token_ids is None:
        return parsed.text or ""
    check_token_ids(parsed.token_ids, engine.rules.vocab_size)
    tokenizer, token_ids = engine.rules.need_tokenizer("a score"), parsed.token_ids
    return engine.rules.guarded(lambda: tokenizer.decode(token_ids))


def score_pairs(engine: RunningEngine, pairs: Pairs, params: PoolingParams, use_tqdm: bool | MakeBar,
                on_error: OnError) -> list[PoolingRequestOutput[PoolingOutput]]:
    """By a cross-encoder, which reads both texts as one prompt.

    Raises:
        RequestValidationError: the model has more labels than one.
    """
    labels = engine.rules.need_pooling("score").poolers.plan.num_labels
    if labels != 1:
        raise RequestValidationError(f"Score API needs a model with one label, this one has {labels}; use classify", "task", labels)
    most, params = params.truncate_prompt_tokens, _uncut(params)
    items = [LazyPrompt(functools.partial(engine.rules.encode_pair, *pair, most)) for pair in pairs]
    return run(engine, items, [params] * len(items), [0] * len(items), use_tqdm, on_error)


def _uncut(params: PoolingParams) -> PoolingParams:
    own = params.clone()
    own.truncate_prompt_tokens = None  # the pair is cut as a pair
    return own


def score_embeddings(engine: RunningEngine, pairs: Pairs, params: PoolingParams, use_tqdm: bool | MakeBar,
                     on_error: OnError) -> list[ScoringRequestOutput]:
    """By the cosine of both texts' embeddings; a text that comes more than once is computed once a side."""
    same = all(pair[0] == pairs[0][0] for pair in pairs)
    first = [pairs[0][0]] if same else [a for a, _ in pairs]
    texts = [*first, *(b for _, b in pairs)]
    outputs = run(engine, texts, [params] * len(texts), [0] * len(texts), use_tqdm, on_error)
    ours = outputs[:len(first)] * (len(pairs) if same else 1)
    padding = engine.tokenizer.pad_token_id if engine.tokenizer is not None else None
    return [_cosine(a, b, [] if padding is None else [padding]) for a, b in zip(ours, outputs[len(first):], strict=True)]


def _cosine(a: PoolingRequestOutput[Any], b: PoolingRequestOutput[Any], padding: list[int]) -> ScoringRequestOutput:
    error = a.error or b.error
    outputs: Any = None if error is not None else ScoringOutput(cosine(a.outputs.data.tolist(), b.outputs.data.tolist()))
    return ScoringRequestOutput(f"{a.request_id}_{b.request_id}", outputs, [*a.prompt_token_ids, *padding, *b.prompt_token_ids], True,
                                a.num_cached_tokens + b.num_cached_tokens, error, b.metrics)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two vectors of one length; 0 where one of them is 0."""
    lengths = math.hypot(*a) * math.hypot(*b)
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0
