"""``logits_processors``: functions that come with a request, in process only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvloom.errors import RequestFailedError, RequestValidationError
from kvloom.interfaces import LogitsProcessor, SequenceView, Tokenizer
from kvloom.params import SamplingParams

OUTPUT_ONLY, PROMPT_TOO = 2, 3
"""Positional parameters of a function that wants the output's ids and the logits, and of one that wants the prompt's ids before."""


def wants_prompt(function: Callable[..., Any]) -> bool:
    """Whether it takes ``(prompt_ids, output_ids, logits)`` and not ``(output_ids, logits)``.

    Raises:
        RequestValidationError: it takes neither.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C: no signature to look at
        return False
    for count in (OUTPUT_ONLY, PROMPT_TOO):
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        return count == PROMPT_TOO
    raise RequestValidationError(f"a function of logits_processors must take (output_ids, logits) or (prompt_ids, output_ids, logits); "
                                 f"{name_of(function)} takes {signature}", "logits_processors", function)


def name_of(function: Callable[..., Any]) -> str:
    """For messages."""
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


@dataclass(slots=True)
class Calls:
    """One sequence's functions, each with whether it wants the prompt."""

    functions: tuple[tuple[Callable[..., Any], bool], ...]
    prompt: list[int]
    output: list[int] = field(default_factory=list)


class Functions(LogitsProcessor):
    """Calls them row by row, in their order, with copies of the ids: what they do to those changes nothing."""

    order = 2

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> list[Callable[..., Any]] | None:
        """See `LogitsProcessor.parameters`. No plain data: an executor with processes of its own refuses them."""
        return list(params.logits_processors or ()) or None

    def new_state(self, parameters: Sequence[Callable[..., Any]], sequence: SequenceView) -> Calls:
        """See `LogitsProcessor.new_state`."""
        return Calls(tuple((f, wants_prompt(f)) for f in parameters), list(sequence.prompt_token_ids))

    def apply(self, logits: Tensor, states: Sequence[Calls]) -> Tensor:
        """See `LogitsProcessor.apply`."""
        for row, state in enumerate(states):
            for function, with_prompt in state.functions:
                logits[row] = _call(function, with_prompt, state, logits[row])
        return logits

    def advance(self, state: Calls, token_ids: Sequence[int]) -> None:
        """See `LogitsProcessor.advance`."""
        state.output.extend(token_ids)

    def rollback(self, state: Calls, num_tokens: int) -> None:
        """See `LogitsProcessor.rollback`."""
        del state.output[len(state.output) - num_tokens:]

    def fork(self, state: Calls) -> Calls:
        """See `LogitsProcessor.fork`; the functions themselves are shared."""
        return Calls(state.functions, list(state.prompt), list(state.output))


def _call(function: Callable[..., Any], with_prompt: bool, state: Calls, row: Tensor) -> Tensor:
    """Raises `RequestFailedError` that names the function."""
    arguments = (list(state.prompt), list(state.output)) if with_prompt else (list(state.output),)
    try:
        out = function(*arguments, row)
    except Exception as error:
        raise RequestFailedError(f"the function {name_of(function)} raised {type(error).__name__}: {error}") from error
    if not isinstance(out, Tensor) or out.shape != row.shape:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise RequestFailedError(f"the function {name_of(function)} gave {got} for logits of the shape {tuple(row.shape)}")
    if bool(out.isnan().any()):
        raise RequestFailedError(f"the function {name_of(function)} left NaN in the logits")
    return out
