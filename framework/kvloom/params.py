"""Parameters of a request: `SamplingParams` and `PoolingParams`. Field names, order and defaults are vLLM's.

Values are checked when the object is made and once more at admission (the object is mutable, as vLLM's is); the engine
works on its own copy. No NaN, no infinity, no bool where a number belongs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from enum import IntEnum
from typing import Any

from kvloom.errors import RequestValidationError, UnsupportedFeatureError, shown

MAX_SEQUENCES_PER_REQUEST = 16384
"""Bound of n."""
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy."""
MAX_STOPS = 64
"""Bound of the number of stop strings."""
MAX_STOP_LENGTH = 1024
"""Bound of a stop string's characters."""
MAX_LISTED = 2**20
"""Bound of lists of token ids."""
MIN_TEMPERATURE = 0.01
"""Smallest temperature that is not greedy; smaller ones are raised to it."""


class RequestOutputKind(IntEnum):
    """What each output of a request holds; `LLM` always returns FINAL_ONLY."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def check_number(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> float:
    """A finite number in [low, high] ((low, high] with `above_low`), else `RequestValidationError`."""
    # NaN fails every comparison, and an int may be too large for a float.
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and not (above_low and value == low):
        return float(value)
    opening = "(" if above_low else "["
    raise RequestValidationError(f"{name} must be a finite number in {opening}{low}, {high}], got {shown(value)}", name, value)


def check_int(name: str, value: object, low: int, high: int = 2**31 - 1) -> int:
    """An int (no bool) in [low, high], else `RequestValidationError`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestValidationError(f"{name} must be an integer in [{low}, {high}], got {shown(value)}", name, value)
    return value


def check_bool(name: str, value: object) -> bool:
    """True or False, else `RequestValidationError`."""
    if not isinstance(value, bool):
        raise RequestValidationError(f"{name} must be True or False, got {shown(value)}", name, value)
    return value


@dataclass
class SamplingParams:
    """How to generate. Positional in field order, as vLLM's.

    Every field of vLLM's is here; those that are not built yet (docs/api.md lists them) raise `UnsupportedFeatureError` unless they
    have their default.

    Args:
        temperature: 0 is greedy; between 0 and 0.01 is raised to 0.01.
        seed: -1 and None mean: derived from the engine's seed and the request's number.
        top_p: the smallest set of tokens with this probability, in (0, 1]; 1 is off.
        top_k: so many best tokens, ties included; -1 and 0 are off.
        min_p: tokens with this share of the best one's probability, in [0, 1]; 0 is off.
        presence_penalty, frequency_penalty: taken from logits of output tokens, once or per occurrence, in [-2, 2].
        repetition_penalty: divides (if positive) or multiplies logits of prompt and output tokens; above 0, 1 is off.
        logit_bias: token id -> number that is added.
        allowed_token_ids: all others are forbidden.
        min_tokens: end-of-text and stop tokens are forbidden before; at most max_tokens.
        stop: texts that end the output; the first in the list that the new text completes. They wait for min_tokens too.
        include_stop_str_in_output: keep the stop string (or the stop token's text) in the text.
        stop_token_ids: end the output; the token is kept in token_ids and left out of the text.
        ignore_eos: neither the tokenizer's nor generation_config's end tokens stop; stop_token_ids still do.
        max_tokens: None means up to the model's maximum length.
        detokenize: False leaves the output text empty.

    Raises:
        RequestValidationError: a value is out of range or of the wrong type.
        UnsupportedFeatureError: see above.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: list[Callable[..., Any]] | None = None
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    guided_decoding: Any = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field; normalise seed and temperature. Called at construction and at admission."""
        for f in fields(self):
            if f.name in UNSUPPORTED_SAMPLING and not _is_default(f.default, getattr(self, f.name)):
                raise UnsupportedFeatureError(f.name, getattr(self, f.name), f"leave it at {f.default!r}")
        self.temperature = check_number("temperature", self.temperature, 0.0, 1e6)
        if GREEDY_BELOW <= self.temperature < MIN_TEMPERATURE:
            self.temperature = MIN_TEMPERATURE
        self.top_p = check_number("top_p", self.top_p, 0.0, 1.0, above_low=True)
        check_int("top_k", self.top_k, -1)
        self.min_p = check_number("min_p", self.min_p, 0.0, 1.0)
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name), -2.0, 2.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.0, 1e6, above_low=True)
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**64 - 1)
            self.seed = None if self.seed == -1 else self.seed
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1)
        check_int("min_tokens", self.min_tokens, 0, self.max_tokens if self.max_tokens is not None else 2**31 - 1)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            check_bool(name, getattr(self, name))
        if self.stop_strings and not self.detokenize:
            raise RequestValidationError("stop strings are found in text, so they need detokenize=True", "stop", self.stop)
        self.stop_token_ids = _check_ids("stop_token_ids", self.stop_token_ids)
        self.allowed_token_ids = _check_ids("allowed_token_ids", self.allowed_token_ids)
        if self.allowed_token_ids == []:
            raise RequestValidationError("allowed_token_ids must name at least one token, or be None", "allowed_token_ids", [])
        if self.logit_bias is not None:
            self.logit_bias = _check_bias(self.logit_bias)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple. Raises `RequestValidationError` when it is anything but a text or a list of texts."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        sound = (isinstance(given, list | tuple) and len(given) <= MAX_STOPS
                 and all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in given))
        if not sound:
            raise RequestValidationError(f"stop must be a text or a list of at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} "
                                         f"characters, got {shown(self.stop)}", "stop", self.stop)
        return tuple(given)

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.temperature < GREEDY_BELOW

    def clone(self) -> SamplingParams:
        """An independent copy."""
        return copy.deepcopy(self)


UNSUPPORTED_SAMPLING = frozenset({
    "n", "best_of", "bad_words", "logprobs", "prompt_logprobs", "spaces_between_special_tokens", "logits_processors",
    "truncate_prompt_tokens", "guided_decoding", "extra_args",
})
"""Fields that only take their default so far."""


def _check_ids(name: str, value: object) -> list[int] | None:
    """A list of token ids, or None."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) > MAX_LISTED:
        raise RequestValidationError(f"{name} must be a list of at most {MAX_LISTED} integers, got {shown(value)}", name, value)
    return [check_int(name, i, 0) for i in value]


def _check_bias(value: object) -> dict[int, float]:
    """Token id -> finite number."""
    if not isinstance(value, dict) or len(value) > MAX_LISTED:
        raise RequestValidationError(f"logit_bias must map at most {MAX_LISTED} token ids to numbers, got {shown(value)}", "logit_bias",
                                     value)
    return {check_int("logit_bias", i, 0): check_number("logit_bias", b, -1e6, 1e6) for i, b in value.items()}


def _is_default(default: object, value: object) -> bool:
    """Equal to the default, or another spelling of "nothing" (empty list, top_k 0)."""
    same = isinstance(value, bool) == isinstance(default, bool) and value == default
    return default is MISSING or same or (default is None and value in ([], {}))


@dataclass
class PoolingParams:
    """How to pool. Pooling tasks are not built yet: the class is here because a `Step` carries it."""

    task: str = "embed"
    dimensions: int | None = None
