"""Logits processors of a step: which row asked for which, in which order. Rows that ask for nothing pay nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from kvloom.config.class_path import make_instance
from kvloom.errors import ConfigError, RequestError, RequestFailedError, RequestValidationError
from kvloom.hooks.registry import Registry
from kvloom.interfaces.sampling import LogitsProcessor, SequenceView, Stage
from kvloom.near import did_you_mean
from kvloom_kernels.transfer import to_device

if TYPE_CHECKING:
    from kvloom.interfaces.tokenizer import Tokenizer
    from kvloom.params import SamplingParams
    from kvloom.runtime.grammar import SequenceGrammar

Asked = tuple[tuple[str, Any], ...]
"""As `NewSequence.processors`: name and parameters of each processor that a request asks for."""


class NamedProcessor(NamedTuple):
    """One processor, whom to name when it fails, and the model of its parameters when requests ask for it by name."""

    name: str
    plugin: str
    processor: LogitsProcessor
    config: type[BaseModel] | None = None


def make_processors(registry: Registry[LogitsProcessor], more: Sequence[type | str] = ()) -> tuple[NamedProcessor, ...]:
    """Every registered processor and `more` (``logits_processors=``), in the order in which they run.

    Raises:
        PluginConflictError: a name that two plugins offer.
        ConfigError: one of `more` cannot be loaded, is no `LogitsProcessor`, or is there twice.
    """
    found = [registry.resolve(name) for name in registry.names()]
    made = [NamedProcessor(e.name, str(e.origin), e.load()(), e.config_model()) for e in found]
    for i, given in enumerate(more):
        processor = make_instance(f"logits_processors[{i}]", given, LogitsProcessor)
        name = f"{type(processor).__module__}:{type(processor).__qualname__}"
        if any(p.name == name for p in made):
            raise ConfigError(f"logits_processors[{i}]={given!r} is there twice")
        made.append(NamedProcessor(name, "logits_processors=", processor))
    return tuple(sorted(made, key=lambda p: (p.processor.stage, p.processor.order, p.name)))


@dataclass(frozen=True, slots=True)
class SequenceProcessors:
    """What one sequence asked for: index of the processor -> its state, and its grammar; or why those could not be made."""

    states: Mapping[int, Any]
    error: RequestError | None = None
    grammar: SequenceGrammar | None = None


NO_PROCESSORS = SequenceProcessors({})


class LogitsPipeline:
    """Runs processors over the rows that asked for them.

    Args:
        processors: see `make_processors`.
    """

    def __init__(self, processors: Sequence[NamedProcessor]) -> None:
        self._processors = tuple(processors)
        self._index = {p.name: i for i, p in enumerate(processors)}
        self._only_random = frozenset(i for i, p in enumerate(processors) if p.processor.stage >= Stage.TEMPERATURE)

    def ask(self, params: SamplingParams, tokenizer: Tokenizer | None) -> Asked:
        """What a request asks for, checked. Once a request, at admission.

        Raises:
            RequestValidationError: parameters that a processor refuses, or a name that nobody registered.
            RequestFailedError: a processor raised something else.
        """
        named = dict(params.extra_args or {})
        asked: dict[str, Any] = {}
        for i, (name, _, _, config) in enumerate(self._processors):
            if config is not None:
                parameters = self._named_parameters(i, config, named.pop(name)) if name in named else None
            else:
                parameters = self._own_parameters(i, params, tokenizer)
            if parameters is not None and not (params.is_greedy and i in self._only_random):  # those cannot change which is best
                asked[name] = parameters
        if named:
            raise self._unknown(next(iter(named)))
        return tuple(asked.items())

    def _named_parameters(self, index: int, config: type[BaseModel], given: Any) -> dict[str, Any]:
        try:
            return _checked(self._processors[index].name, config, given).model_dump(mode="json")
        except RequestError:
            raise
        except Exception as error:
            raise self._failure(index, f"raised {type(error).__name__}: {error}") from error

    def _own_parameters(self, index: int, params: SamplingParams, tokenizer: Tokenizer | None) -> Any | None:
        try:
            return self._processors[index].processor.parameters(params, tokenizer)
        except RequestError:
            raise
        except Exception as error:
            raise self._failure(index, f"raised {type(error).__name__}: {error}") from error

    def _unknown(self, name: str) -> RequestValidationError:
        known = [p.name for p in self._processors if p.config is not None]
        return RequestValidationError(f"extra_args names {name!r}, but no plugin registered a logits processor with parameters under "
                                      f"this name{did_you_mean(name, known)}; there are: {', '.join(known) or 'none'}", "extra_args",
                                      name)

    def start(self, sequence: SequenceView, asked: Asked, output: Sequence[int] = ()) -> SequenceProcessors:
        """States of a sequence that has this output already (a resumed one).

        Raises:
            RequestValidationError: parameters that a processor refuses.
            RequestFailedError: a processor raised something else.
        """
        states: dict[int, Any] = {}
        for name, parameters in asked:
            i = self._index[name]
            _, _, processor, config = self._processors[i]
            try:
                states[i] = processor.new_state(parameters if config is None else config.model_validate(parameters), sequence)
                if output:
                    processor.advance(states[i], output)
            except RequestError:
                raise
            except Exception as error:
                raise self._failure(i, f"raised {type(error).__name__}: {error}") from error
        return SequenceProcessors(states)

    def apply(self, logits: Tensor, sequences: Sequence[SequenceProcessors]) -> Tensor:
        """``logits [S, V]`` float32, one row a sequence -> the same, changed.

        Raises:
            RequestFailedError: a processor raised, or gave another shape; the message names it and its plugin.
        """
        for i in sorted({i for s in sequences for i in s.states}):
            rows = [r for r, s in enumerate(sequences) if i in s.states]
            states = [sequences[r].states[i] for r in rows]
            if len(rows) == len(sequences):
                logits = self._run(i, logits, states)
            else:
                index = to_device(np.array(rows), logits.device)
                logits[index] = self._run(i, logits[index], states)
        return logits

    def blame(self, logits: Tensor, sequence: SequenceProcessors) -> str:
        """Why nothing can be sampled from the row that came of ``logits [1, V]``: who made it so, as a phrase."""
        if not _can_be_sampled(logits):
            return "its logits are not finite: the model computed NaN or infinity for it"
        for i in sorted(sequence.states):
            logits = self._run(i, logits, [sequence.states[i]])
            if not _can_be_sampled(logits):
                what = "NaN or infinity" if not torch.isneginf(logits).all() else "no allowed token"
                return f"{self._who(i)} left {what} in its logits"
        return "its logits are not finite"

    def _run(self, index: int, logits: Tensor, states: Sequence[Any]) -> Tensor:
        shape = logits.shape
        try:
            out = self._processors[index].processor.apply(logits, states)
        except Exception as error:
            raise self._failure(index, f"raised {type(error).__name__}: {error}") from error
        if not isinstance(out, Tensor) or out.shape != shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise self._failure(index, f"gave the shape {got} for {tuple(shape)}")
        return out.float()

    def _who(self, index: int) -> str:
        name, plugin, _, _ = self._processors[index]
        return f"logits processor {name!r} ({plugin})"

    def _failure(self, index: int, what: str) -> RequestFailedError:
        return RequestFailedError(f"{self._who(index)} {what}")

    def advance(self, sequence: SequenceProcessors, token_ids: Sequence[int]) -> None:
        """The sequence accepted these tokens. Raises `RequestFailedError` that names the processor."""
        for i, state in sequence.states.items():
            try:
                self._processors[i].processor.advance(state, token_ids)
            except Exception as error:
                raise self._failure(i, f"raised {type(error).__name__}: {error}") from error


def _checked(name: str, config: type[BaseModel], given: Any) -> BaseModel:
    """Raises `RequestValidationError` with every wrong field and the schema's field names."""
    try:
        return config.model_validate(given)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or name}: {e['msg']}" for e in error.errors())
        fields = ", ".join(config.model_fields) or "none"
        raise RequestValidationError(f"extra_args[{name!r}]: {problems} (its parameters: {fields})", "extra_args", given) from error


def _can_be_sampled(logits: Tensor) -> bool:
    """Whether the best of a row is a number (NaN wins every comparison, so the maximum shows it)."""
    return bool(torch.isfinite(logits.max()))
