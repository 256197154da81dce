"""Arguments of a call that go with its prompts: one for all, or one each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, Literal, TypeVar

from kvloom.errors import RequestTypeError, RequestValidationError, UnsupportedFeatureError, shown
from kvloom.param_checks import check_int
from kvloom.params import PoolingParams, SamplingParams

_END: Any = object()
P = TypeVar("P", SamplingParams, PoolingParams)
OnError = Literal["raise", "return"]
"""What a call does with a request that fails."""


def check_on_error(value: object) -> None:
    """Raises `RequestValidationError` unless it is an `OnError`."""
    if not isinstance(value, str) or value not in ("raise", "return"):
        raise RequestValidationError(f"on_error must be 'raise' or 'return', got {shown(value)}", "on_error", value)


def one_each(count: int, given: P | Sequence[P] | None, default: P, name: str = "sampling_params") -> list[P]:
    """Parameters of each prompt, the caller's own objects.

    Args:
        default: of None; all must be of its class.

    Raises:
        RequestValidationError: another number than prompts.
        RequestTypeError: something of another class.
    """
    wanted = type(default)
    if given is None or isinstance(given, wanted):
        return [default if given is None else given] * count
    if not isinstance(given, Sequence):
        raise _wrong_type(given, wanted, name)
    if len(given) != count:
        raise RequestValidationError(f"The lengths of prompts and params must be the same: {count} and {len(given)}.", name, len(given))
    for p in given:
        if not isinstance(p, wanted):
            raise _wrong_type(p, wanted, name)
    return list(given)


def _wrong_type(value: object, wanted: type = SamplingParams, name: str = "sampling_params") -> RequestTypeError:
    return RequestTypeError(f"{name} must be {wanted.__name__}, one for all or one a prompt; got {type(value).__name__}", name, value)


def refuse_later(**arguments: Any) -> None:
    """Raises `UnsupportedFeatureError` for the first that was given."""
    for name, value in arguments.items():
        if value is not None:
            raise UnsupportedFeatureError(name, value, "leave it out")


def priorities_each(count: int, given: int | Sequence[int] | None) -> list[int]:
    """Priority of each prompt, checked.

    Raises:
        RequestValidationError: no integer, or another number than prompts.
    """
    if given is None or isinstance(given, int):
        values: Sequence[int] = [0 if given is None else given] * count
    elif isinstance(given, Sequence):
        values = given
    else:
        raise RequestTypeError(f"priority must be an integer, or one a prompt; got {type(given).__name__}", "priority", given)
    if len(values) != count:
        raise RequestValidationError(f"The lengths of prompts and priority must be the same: {count} and {len(values)}.",
                                     "priority", given)
    return [check_int("priority", v, -(2**31)) for v in values]


def pair_up(prompts: Iterable[Any], given: SamplingParams | Iterable[SamplingParams] | None,
            default: SamplingParams) -> Iterator[tuple[Any, SamplingParams]]:
    """Prompts with their parameters, read as they are asked for.

    Raises:
        RequestTypeError: at once: not iterable, or a single prompt; later: something that is no `SamplingParams`.
        RequestValidationError: later: the parameters end before the prompts.
    """
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        raise RequestTypeError(f"prompts must be an iterable of prompts, got {type(prompts).__name__}", "prompts", prompts)
    if given is None or isinstance(given, SamplingParams):
        return zip(prompts, repeat(default if given is None else given))
    if not isinstance(given, Iterable):
        raise _wrong_type(given)
    return _pairs(prompts, given)


def _pairs(prompts: Iterable[Any], given: Iterable[SamplingParams]) -> Iterator[tuple[Any, SamplingParams]]:
    following = iter(given)
    for prompt in prompts:
        params = next(following, _END)
        if params is _END:
            raise RequestValidationError("The lengths of prompts and params must be the same: the parameters ended first.",
                                         "sampling_params")
        if not isinstance(params, SamplingParams):
            raise _wrong_type(params)
        yield prompt, params
