"""Checks of request parameters: each gives the value back in one form or raises `RequestValidationError`. Torch-free.

No NaN, no infinity, no bool where a number belongs, and a bound on everything that has a length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from kvloom.errors import RequestValidationError, shown

MAX_LISTED = 2**20
"""Bound of lists of token ids."""
MAX_CALLABLES = 16
"""Bound of `logits_processors`."""
MAX_EXTRA_CHARACTERS = 2**20
"""Bound of `extra_args` as JSON."""


def check_number(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> float:
    """A finite number in [low, high] ((low, high] with `above_low`)."""
    # NaN fails every comparison, and an int may be too large for a float.
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and not (above_low and value == low):
        return float(value)
    opening = "(" if above_low else "["
    raise RequestValidationError(f"{name} must be a finite number in {opening}{low}, {high}], got {shown(value)}", name, value)


def check_int(name: str, value: object, low: int, high: int = 2**31 - 1) -> int:
    """An int (no bool) in [low, high], as a plain int: a subclass may compare as it likes."""
    if isinstance(value, int) and not isinstance(value, bool):
        plain = int.__index__(value)
        if low <= plain <= high:
            return plain
    raise RequestValidationError(f"{name} must be an integer in [{low}, {high}], got {shown(value)}", name, value)


def check_bool(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise RequestValidationError(f"{name} must be True or False, got {shown(value)}", name, value)
    return value


def check_ids(name: str, value: object) -> list[int] | None:
    """A list of token ids, or None."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) > MAX_LISTED:
        raise RequestValidationError(f"{name} must be a list of at most {MAX_LISTED} integers, got {shown(value)}", name, value)
    return [check_int(name, i, 0) for i in value]


def check_bias(value: object) -> dict[int, float]:
    """Token id -> finite number."""
    if not isinstance(value, dict) or len(value) > MAX_LISTED:
        raise RequestValidationError(f"logit_bias must map at most {MAX_LISTED} token ids to numbers, got {shown(value)}", "logit_bias",
                                     value)
    return {check_int("logit_bias", i, 0): check_number("logit_bias", b, -1e6, 1e6) for i, b in value.items()}


def check_texts(name: str, value: object, most: int, longest: int) -> tuple[str, ...]:
    """At most `most` texts of 1 to `longest` characters."""
    sound = (isinstance(value, list | tuple) and len(value) <= most
             and all(isinstance(s, str) and 0 < len(s) <= longest and is_unicode(s) for s in value))
    if not sound:
        raise RequestValidationError(f"{name} must be at most {most} texts of 1 to {longest} characters, got {shown(value)}", name,
                                     value)
    return tuple(value)  # type: ignore[arg-type]  # checked above


def is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_callables(name: str, value: object) -> Sequence[Callable[..., Any]]:
    """A list of functions, or None."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or len(value) > MAX_CALLABLES or not all(map(callable, value)):
        raise RequestValidationError(f"{name} must be a list of at most {MAX_CALLABLES} functions, got {shown(value)}", name, value)
    return value


def check_extra_args(name: str, value: object) -> dict[str, Any]:
    """JSON objects by name, or None: what a request may send to plugins. No NaN, no integer beyond 64 bits, bounded."""
    if value is None:
        return {}
    try:
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise TypeError("it must map names to JSON values")
        _check_integers(value)
        if len(json.dumps(value, allow_nan=False)) > MAX_EXTRA_CHARACTERS:
            raise ValueError(f"it has more than {MAX_EXTRA_CHARACTERS} characters as JSON")
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestValidationError(f"{name} must hold JSON data by name: {error}; got {shown(value)}", name, value) from error
    return value


def _check_integers(value: object) -> None:
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ValueError("an integer has more than 64 bits")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check_integers(item)
