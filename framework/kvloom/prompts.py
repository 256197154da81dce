"""The forms a prompt may have, and what they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from kvloom.errors import RequestTypeError, RequestValidationError, UnsupportedFeatureError, shown

FORMS = "a text, a list of token ids, {'prompt': text}, {'prompt_token_ids': [...]}, or a list of these"
LATER_KEYS = ("multi_modal_data", "mm_processor_kwargs", "token_type_ids", "prompt_embeds", "cache_salt", "multi_modal_uuids",
              "encoder_prompt", "decoder_prompt")
"""Keys of vLLM's prompt dicts that are not supported so far."""


class TextPrompt(TypedDict):
    """A text; the tokenizer adds its special tokens."""

    prompt: str


class TokensPrompt(TypedDict):
    """Token ids, taken as they are; `prompt` is their text if the caller knows it."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """One prompt: text that is still to be encoded, or token ids, or both."""

    text: str | None
    token_ids: tuple[int, ...] | None


def parse_prompts(prompts: Any) -> list[ParsedPrompt]:
    """One `ParsedPrompt` a prompt, in order. See `FORMS`.

    Raises:
        RequestTypeError: something else.
        RequestValidationError: a prompt without tokens.
        UnsupportedFeatureError: a key of a later feature.
    """
    if isinstance(prompts, str | Mapping):
        return [_parse(prompts)]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise RequestTypeError(f"prompts must be {FORMS}; got {type(prompts).__name__}", "prompts", prompts)
    if prompts and all(_is_int(p) for p in prompts):
        return [_parse(prompts)]
    return [_parse(p) for p in prompts]


def _parse(prompt: Any) -> ParsedPrompt:
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None)
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt)
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        return ParsedPrompt(None, _token_ids(prompt))
    raise RequestTypeError(f"a prompt must be {FORMS}; got {type(prompt).__name__}", "prompts", prompt)


def _parse_mapping(prompt: Mapping[Any, Any]) -> ParsedPrompt:
    for key in prompt:
        if key in LATER_KEYS and prompt[key] is not None:
            raise UnsupportedFeatureError(f"prompt[{key!r}]", prompt[key], "leave it out")
        if key not in ("prompt", "prompt_token_ids", *LATER_KEYS):
            raise RequestTypeError(f"a prompt has no key {key!r}; it must contain 'prompt' or 'prompt_token_ids'", "prompts", key)
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestTypeError(f"prompt['prompt'] must be a text, got {type(text).__name__}", "prompt", text)
    if ids is not None:
        return ParsedPrompt(text, _token_ids(ids))
    if text is None:
        raise RequestTypeError("a prompt must contain 'prompt' (text) or 'prompt_token_ids'", "prompts", dict(prompt))
    return ParsedPrompt(text, None)


def _token_ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes) or not all(_is_int(i) for i in ids):
        raise RequestTypeError("prompt_token_ids must be a list of integers", "prompt_token_ids", ids)
    if not ids:
        raise RequestValidationError("The prompt cannot be empty: prompt_token_ids has no token", "prompt_token_ids", ids)
    return tuple(ids)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises `RequestValidationError` for the first id that the model has no embedding for."""
    if min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return
    bad = next(i for i in token_ids if not 0 <= i < vocab_size)
    raise RequestValidationError(f"Token id {shown(bad)} is out of vocabulary: ids of this model are 0 to {vocab_size - 1}",
                                 "prompt_token_ids", bad)
