"""Logits processors of a step: which row asked for which, in which order. Rows that ask for nothing pay nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from kvloom.errors import RequestError, RequestFailedError
from kvloom.hooks.registry import Registry
from kvloom.interfaces.sampling import LogitsProcessor, SequenceView, Stage


class NamedProcessor(NamedTuple):
    """One processor, and whom to name when it fails."""

    name: str
    plugin: str
    processor: LogitsProcessor


def make_processors(registry: Registry[LogitsProcessor]) -> tuple[NamedProcessor, ...]:
    """Every registered processor, in the order in which they run. Raises `PluginConflictError` for a name that two offer."""
    found = [registry.resolve(name) for name in registry.names()]
    made = [NamedProcessor(e.name, str(e.origin), e.load()()) for e in found]
    return tuple(sorted(made, key=lambda p: (p.processor.stage, p.processor.order, p.name)))


@dataclass(frozen=True, slots=True)
class SequenceProcessors:
    """What one sequence asked for: index of the processor -> its state."""

    states: Mapping[int, Any]


NO_PROCESSORS = SequenceProcessors({})


class LogitsPipeline:
    """Runs processors over the rows that asked for them.

    Args:
        processors: see `make_processors`.
    """

    def __init__(self, processors: Sequence[NamedProcessor]) -> None:
        self._processors = tuple(processors)
        self._only_random = frozenset(i for i, p in enumerate(processors) if p.processor.stage >= Stage.TEMPERATURE)

    def start(self, sequence: SequenceView, output: Sequence[int] = ()) -> SequenceProcessors:
        """States of a sequence that has this output already (a resumed one).

        Raises:
            RequestValidationError: parameters that a processor refuses.
        RequestFailedError: a processor raised something else.
        """
        states: dict[int, Any] = {}
        for i, (_, _, processor) in enumerate(self._processors):
            if sequence.params.is_greedy and i in self._only_random:
                continue  # cannot change which token is best
            try:
                parameters = processor.parameters(sequence.params)
                if parameters is not None:
                    states[i] = processor.new_state(parameters, sequence)
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
                logits[rows] = self._run(i, logits[rows], states)
        return logits

    def _run(self, index: int, logits: Tensor, states: Sequence[Any]) -> Tensor:
        shape = logits.shape
        try:
            out = self._processors[index].processor.apply(logits, states)
        except Exception as error:
            raise self._failure(index, f"raised {type(error).__name__}: {error}") from error
        if out.shape != shape:
            raise self._failure(index, f"gave the shape {tuple(out.shape)} for {tuple(shape)}")
        return out

    def _failure(self, index: int, what: str) -> RequestFailedError:
        name, plugin, _ = self._processors[index]
        return RequestFailedError(f"logits processor {name!r} ({plugin}) {what}")

    def advance(self, sequence: SequenceProcessors, token_ids: Sequence[int]) -> None:
        """The sequence accepted these tokens."""
        for i, state in sequence.states.items():
            self._processors[i].processor.advance(state, token_ids)
