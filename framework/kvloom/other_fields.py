"""Fields that the parameter classes of other versions of vLLM have: refused with what to do, never a bare `TypeError`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from kvloom.errors import UnsupportedFeatureError
from kvloom.near import did_you_mean

C = TypeVar("C", bound=type)
R = TypeVar("R")


class OtherField(NamedTuple):
    """A field that only its default fits.

    Args:
        instead: what to do.
    """

    default: Any
    instead: str


_BEAMS = "beam search has a method of its own: LLM.beam_search(prompts, BeamSearchParams(...))"
_ACTIVATION = "it is called use_activation"

SAMPLING: Mapping[str, OtherField] = MappingProxyType({
    "use_beam_search": OtherField(False, _BEAMS),
    "length_penalty": OtherField(1.0, _BEAMS),
    "early_stopping": OtherField(False, _BEAMS),
    "flat_logprobs": OtherField(False, "log-probabilities are a list with one dict a token"),
    "skip_clone": OtherField(False, "parameters are copied when a request is made; that costs microseconds"),
    "logprob_token_ids": OtherField(None, "use logprobs=k, or -1 for the whole vocabulary"),
    "thinking_token_budget": OtherField(None, "use max_tokens"),
    "repetition_detection": OtherField(None, "use repetition_penalty, or stop"),
})
POOLING: Mapping[str, OtherField] = MappingProxyType({
    "normalize": OtherField(None, _ACTIVATION),
    "softmax": OtherField(None, _ACTIVATION),
    "activation": OtherField(None, _ACTIVATION),
    "additional_metadata": OtherField(None, "it is called additional_data"),
    "requires_token_ids": OtherField(False, "a pooler is given the prompt's ids anyway"),
    "output_kind": OtherField(None, "leave it out: a pooling request has one output, when it is done"),
    "late_interaction_params": OtherField(None, "encode(..., pooling_task='token_embed') gives a row a token"),
})
STRUCTURE: Mapping[str, OtherField] = MappingProxyType({
    "disable_fallback": OtherField(False, "there is no other backend to fall back to"),
    "backend_was_auto": OtherField(False, "it is a note of an engine to itself"),
})
BEAMS: Mapping[str, OtherField] = MappingProxyType({
    "early_stopping": OtherField(False, "a search runs to max_tokens, or until every beam has ended"),
    "structured_outputs": OtherField(None, "use generate with SamplingParams(structured_outputs=...)"),
    "watermarking": OtherField(None, "leave it out"),
})


def refuses(other: Mapping[str, OtherField]) -> Callable[[C], C]:
    """Decorates a class of parameters, whose constructor is then `guarded`."""

    def decorate(cls: C) -> C:
        cls.__init__ = guarded(cls.__init__, None, other)  # type: ignore[misc]
        return cls

    return decorate


def guarded(call: Callable[..., R], what: str | None, other: Mapping[str, OtherField]) -> Callable[..., R]:
    """`call`, but names that it does not have raise `UnsupportedFeatureError` if `other` has them, unless they come with their default,
    else `TypeError` with the near name.

    Args:
        what: is called, for messages; None: the class of the first argument.
    """
    parameters = inspect.signature(call).parameters
    known = frozenset(parameters) - {"self"}
    by_keyword = [name for name in known if parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY]

    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> R:
        if not kwargs.keys() <= known:
            label = what or type(args[0]).__name__
            kwargs = {name: value for name, value in kwargs.items() if name in known or refuse(label, name, value)}
        return call(*args, **kwargs)

    def refuse(what: str, name: str, value: Any) -> bool:
        field = other.get(name)
        if field is None:
            raise TypeError(f"{what}() got an unexpected keyword argument {name!r}{did_you_mean(name, by_keyword)}")
        if value is not field.default and (type(value) is not type(field.default) or value != field.default):
            raise UnsupportedFeatureError(f"{what}.{name}", value, field.instead)
        return False

    return checked
