"""The forms a prompt may have, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NotRequired, TypedDict

from kvloom.errors import RequestTypeError, RequestValidationError, UnsupportedFeatureError, shown
from kvloom.param_checks import is_unicode

FORMS = "a text, a list of token ids, {'prompt': text}, {'prompt_token_ids': [...]}, or a list of these"
LATER_KEYS = ("multi_modal_data", "mm_processor_kwargs", "prompt_embeds", "multi_modal_uuids")
"""Keys of vLLM's prompt dicts that are not supported so far."""
EXTRA_KEYS = ("token_type_ids",)
"""Keys of integers that go with the token ids, one each."""
ENCODER_KEYS = ("encoder_prompt", "decoder_prompt")
"""Keys of prompts for encoder-decoder models."""
MAX_SALT_LENGTH = 1024
"""Bound of a cache salt's characters."""


class TextPrompt(TypedDict):
    """A text; the tokenizer adds its special tokens. Prompts of different `cache_salt` share no KV blocks."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """Token ids, taken as they are; `prompt` is their text if the caller knows it.

    `token_type_ids` says of each which text of a pair it belongs to, for models that have token types.
    """

    prompt_token_ids: list[int]
    token_type_ids: NotRequired[list[int]]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


@dataclass(frozen=True, slots=True)
class Truncation:
    """How a prompt is cut.

    Args:
        tokens: that are kept; -1: as many as the model can take, of a prompt that is continued one less.
        keep_end: the last ones, else the first ones; None: of a prompt that is continued the last ones, of a text that is pooled
            those that the tokenizer keeps.
    """

    tokens: int
    keep_end: bool | None = None

    def kept(self, num_tokens: int) -> slice:
        """Which items of what is as long as the prompt belong to the `num_tokens` that were kept."""
        return slice(num_tokens) if self.keep_end is False else slice(-num_tokens, None)


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """One prompt: text that is still to be encoded, or token ids, or both.

    Args:
        truncation: how it is cut; None: as the parameters say.
        extras: see `NewSequence`; as long as the token ids.
    """

    text: str | None
    token_ids: tuple[int, ...] | None
    cache_salt: str = ""
    truncation: Truncation | None = None
    extras: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LazyPrompt:
    """A prompt that is made when its request is admitted, so that what goes wrong then is that request's failure."""

    make: Callable[[], ParsedPrompt]


def split_prompts(prompts: Any) -> list[Any]:
    """One item a prompt, each still in any form: see `FORMS`.

    Raises:
        RequestTypeError: neither a prompt nor a sequence of prompts.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise RequestTypeError(f"prompts must be {FORMS}; got {type(prompts).__name__}", "prompts", prompts)
    if prompts and all(_is_int(p) for p in prompts):
        return [prompts]
    return list(prompts)


def parse_prompt(prompt: Any) -> ParsedPrompt:
    """A single prompt; of a `LazyPrompt` what it makes, and what that raises.

    Raises:
        RequestTypeError: none of the forms, or one for encoder-decoder models.
        RequestValidationError: a prompt without tokens.
        UnsupportedFeatureError: a key of a later feature.
    """
    if isinstance(prompt, LazyPrompt):
        return prompt.make()
    if isinstance(prompt, str):
        return ParsedPrompt(_text(prompt), None)
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt)
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        return ParsedPrompt(None, _token_ids(prompt))
    raise RequestTypeError(f"a prompt must be {FORMS}; got {type(prompt).__name__}", "prompts", prompt)


def _parse_mapping(prompt: Mapping[Any, Any]) -> ParsedPrompt:
    for key in prompt:
        if key in ENCODER_KEYS:
            raise RequestTypeError("Cannot pass encoder-decoder prompt to decoder-only models: give a text or token ids", "prompts",
                                   key)
        if key in LATER_KEYS and prompt[key] is not None:
            raise UnsupportedFeatureError(f"prompt[{key!r}]", prompt[key], "leave it out")
        if key not in ("prompt", "prompt_token_ids", "cache_salt", *EXTRA_KEYS, *LATER_KEYS):
            raise RequestTypeError(f"a prompt has no key {shown(key)}; it must contain text, tokens, or embeddings: kvloom takes "
                                   "'prompt' and 'prompt_token_ids'", "prompts", key)
    text, ids, salt = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("cache_salt")
    if text is not None and not isinstance(text, str):
        raise RequestTypeError(f"prompt['prompt'] must be a text, got {type(text).__name__}", "prompt", text)
    if text is not None:
        _text(text)
    if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT_LENGTH):
        raise RequestValidationError(f"cache_salt must be a text of 1 to {MAX_SALT_LENGTH} characters, got {shown(salt)}",
                                     "cache_salt", salt)
    if text is None and ids is None:
        raise RequestTypeError("a prompt must contain text, tokens, or embeddings: give 'prompt' or 'prompt_token_ids'", "prompts",
                               dict(prompt))
    token_ids = None if ids is None else _token_ids(ids)
    extras = {key: _extra(key, prompt[key], token_ids) for key in EXTRA_KEYS if prompt.get(key) is not None}
    return ParsedPrompt(text, token_ids, salt or "", extras=extras)


def _extra(name: str, values: Any, token_ids: tuple[int, ...] | None) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not all(_is_int(i) for i in values):
        raise RequestTypeError(f"{name} must be a list of integers", name, values)
    if token_ids is None:
        raise RequestValidationError(f"{name} need the prompt_token_ids that they go with", name, values)
    if len(values) != len(token_ids):
        raise RequestValidationError(f"{name} must be as many as prompt_token_ids: {len(values)} and {len(token_ids)}", name, values)
    return tuple(map(int, values))


def _text(text: str) -> str:
    if not is_unicode(text):
        raise RequestValidationError(f"a prompt must be Unicode text, this one has lone surrogates: {shown(text)}", "prompt", text)
    return text


def _token_ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes) or not all(_is_int(i) for i in ids):
        raise RequestTypeError("prompt_token_ids must be a list of integers; of an array or a tensor give .tolist()",
                               "prompt_token_ids", ids)
    if not ids:
        raise RequestValidationError("The prompt cannot be empty: prompt_token_ids has no token", "prompt_token_ids", ids)
    return tuple(map(int, ids))


def _is_int(value: object) -> bool:
    """Also numpy's."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises `RequestValidationError` for the first id that the model has no embedding for."""
    if min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return
    bad = next(i for i in token_ids if not 0 <= i < vocab_size)
    raise RequestValidationError(f"Token id {shown(bad)} is out of vocabulary: ids of this model are 0 to {vocab_size - 1}",
                                 "prompt_token_ids", bad)


def check_extras(extras: Mapping[str, Sequence[int]], bounds: Mapping[str, int]) -> None:
    """Integers that go with the tokens are such as the model takes: see `Model.extra_inputs`.

    Raises:
        UnsupportedFeatureError: the model takes none of this name.
        RequestValidationError: one is out of range.
    """
    for name, values in extras.items():
        if name not in bounds:
            raise UnsupportedFeatureError(f"prompt[{name!r}]", list(values[:8]), "this model takes none; leave it out")
        bad = next((i for i in values if not 0 <= i < bounds[name]), None)
        if bad is not None:
            raise RequestValidationError(f"{name} of this model are 0 to {bounds[name] - 1}, got {shown(bad)}", name, bad)


def legacy_prompts(prompts: str | Sequence[str] | None, prompt_token_ids: Any) -> list[Any]:
    """What ``generate(prompts, prompt_token_ids=...)`` of older versions means. Texts win; the ids are then only counted.

    Raises:
        RequestTypeError: ids that are neither a list of integers nor a list of such lists.
        RequestValidationError: nothing at all, or different numbers of texts and ids.
    """
    ids = _legacy_ids(prompt_token_ids)
    if prompts is None:
        return [{"prompt_token_ids": i} for i in ids]
    texts = split_prompts(prompts)
    if len(texts) != len(ids):
        raise RequestValidationError(f"The lengths of prompts and prompt_token_ids must be the same: {len(texts)} and {len(ids)}.",
                                     "prompt_token_ids", len(ids))
    return texts


def _legacy_ids(given: Any) -> list[Sequence[int]]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise _no_prompts(given)
    if not len(given) or (len(given) == 1 and isinstance(given[0], Sequence) and not len(given[0])):
        raise RequestValidationError("please provide at least one prompt", "prompt_token_ids", given)
    if all(_is_int(i) for i in given):
        return [given]
    if all(isinstance(p, Sequence) and not isinstance(p, str) and all(_is_int(i) for i in p) for p in given):
        return list(given)
    raise _no_prompts(given)


def _no_prompts(given: object) -> RequestTypeError:
    return RequestTypeError("prompt must be a string, array of strings, array of tokens, or array of token arrays", "prompt_token_ids",
                            given)
