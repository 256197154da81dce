"""``tokenization_kwargs``: how prompts are cut to a number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvloom.errors import RequestTypeError, RequestValidationError, shown
from kvloom.near import did_you_mean
from kvloom.param_checks import check_bool, check_int
from kvloom.prompts import LazyPrompt, Truncation, parse_prompt

KEYS = ("truncate_prompt_tokens", "truncation_side", "truncation", "max_length")
AS_LONG_AS_POSSIBLE = -1


def read_truncation(given: Any) -> Truncation | None:
    """``{"truncate_prompt_tokens": k}``, or as transformers has it ``{"truncation": True, "max_length": k}``; with
    ``"truncation_side"``: "left" keeps the end, "right" the beginning; see `Truncation`. None for nothing.

    Raises:
        RequestTypeError: no dict.
        RequestValidationError: an unknown key, a value out of range, or two keys that contradict each other.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise RequestTypeError(f"tokenization_kwargs must be a dict, got {type(given).__name__}", "tokenization_kwargs", given)
    for key in given:
        if key not in KEYS:
            raise RequestValidationError(f"tokenization_kwargs has the unknown key {shown(key)}"
                                         f"{did_you_mean(key, KEYS) if isinstance(key, str) else ''} (keys: {', '.join(KEYS)})",
                                         "tokenization_kwargs", key)
    side = given.get("truncation_side")
    if side not in (None, "left", "right"):
        raise RequestValidationError(f"truncation_side must be 'left' or 'right', got {shown(side)}", "truncation_side", side)
    tokens = _tokens(given)
    return None if tokens is None else Truncation(tokens, None if side is None else side == "left")


def _tokens(given: Mapping[str, Any]) -> int | None:
    wanted, length = given.get("truncate_prompt_tokens"), given.get("max_length")
    truncation = given.get("truncation")
    if truncation is not None:
        check_bool("truncation", truncation)
    if wanted is not None and (length is not None or truncation is not None):
        raise RequestValidationError("truncate_prompt_tokens means the same as truncation with max_length: give one of them",
                                     "truncate_prompt_tokens", wanted)
    if wanted is not None:
        if check_int("truncate_prompt_tokens", wanted, -1) == 0:
            raise RequestValidationError("truncate_prompt_tokens must be at least 1, or -1", "truncate_prompt_tokens", 0)
        return int(wanted)
    if length is not None and not truncation:
        raise RequestValidationError("max_length cuts prompts only with truncation=True", "max_length", length)
    if not truncation:
        return None
    return AS_LONG_AS_POSSIBLE if length is None else check_int("max_length", length, 1)


def cut_prompts(prompts: list[Any], tokenization_kwargs: Any) -> list[Any]:
    """The same prompts, in any of their forms, that are cut when their requests are admitted. Raises what `read_truncation` does."""
    truncation = read_truncation(tokenization_kwargs)
    return prompts if truncation is None else [_cut(p, truncation) for p in prompts]


def _cut(prompt: Any, truncation: Truncation) -> LazyPrompt:
    return LazyPrompt(lambda: replace(parse_prompt(prompt), truncation=truncation))
