"""From logits to tokens: logits processors and samplers.

Order of one step: grammar mask, raw log-probabilities, processors by `Stage`, sampler. Rows that ask for nothing pay nothing: a
processor only ever sees the rows of requests that asked for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from kvloom.params import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from kvloom.interfaces.tokenizer import Tokenizer


class Stage(IntEnum):
    """When a processor runs. Greedy rows skip the stages from TEMPERATURE on: they cannot change an argmax."""

    MASK = 10         # allowed_token_ids, bad_words
    BIAS = 20         # min_tokens, logit_bias, custom processors
    PENALTY = 30      # repetition, frequency, presence
    TEMPERATURE = 40  # scaling, argmax-invariant custom processors
    FILTER = 50       # min_p, top_k, top_p


class SequenceView(NamedTuple):
    """What a processor's factory may know of a sequence; nothing of it changes later."""

    sequence_id: int
    sample_index: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    vocab_size: int
    end_token_ids: tuple[int, ...] = ()


class LogitsProcessor(ABC):
    """Changes the logits of the rows that ask for it. Registered with ``kvloom_register_logits_processors``.

    A request asks in one of two ways. A *named* processor, one that is registered with ``config=``, is asked for by name:
    ``SamplingParams(extra_args={"name": {...}})``; the core checks the JSON with that pydantic model. Any other decides from the
    request's own fields, see `parameters`.

    One instance an engine; state is per *sequence* (siblings of n > 1 and beams never share it).
    """

    stage: ClassVar[Stage] = Stage.BIAS
    order: ClassVar[int] = 0
    """Place within the stage: smaller first, equal ones by the name they are registered under."""

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Tokenizer | None) -> Any | None:
        """What the request's fields ask of this processor, as plain data (it travels to the workers); None: nothing.

        Called once a request, at admission; not called for a named processor. `tokenizer` is None with ``skip_tokenizer_init``.

        Raises:
            RequestValidationError: bad values.
        """
        return None

    @abstractmethod
    def new_state(self, parameters: Any, sequence: SequenceView) -> Any:
        """State of one sequence, before its first output token. Called at admission too, and the result thrown away.

        Args:
            parameters: what `parameters` gave, or a named processor's validated pydantic model.

        Raises:
            RequestValidationError: values that do not fit this model, such as ids out of the vocabulary.
        """

    @abstractmethod
    def apply(self, logits: Tensor, states: Sequence[Any]) -> Tensor:
        """``logits [r, V]`` float32 of the asking rows, one state each -> ``[r, V]``; may work in place on `logits`.

        Must not change a state: a step can be repeated.
        """

    def advance(self, state: Any, token_ids: Sequence[int]) -> None:
        """The sequence accepted these output tokens (once per commit)."""

    def rollback(self, state: Any, num_tokens: int) -> None:
        """Undo the last `num_tokens` of `advance` (rejected drafts)."""

    def fork(self, state: Any) -> Any:
        """An independent copy for a forked sequence."""
        import copy

        return copy.deepcopy(state)


@dataclass(slots=True)
class SamplingRows:
    """The rows to sample in one step: S sequences, each with 1 + its drafts rows of logits.

    Args:
        sequence_ids: ``[S]`` int64, host.
        row_starts: ``[S + 1]`` int64, host: sequence s owns rows ``[row_starts[s], row_starts[s + 1])``.
        params: one a sequence.
        temperatures: ``[S]`` float32, host; 0 is greedy. Logits were divided by it already.
        seeds: ``[S]`` uint64, host: key of the counter-based generator.
        sample_indices: ``[S]`` int64, host: 0..n-1 within the request.
        positions: ``[S]`` int64, host: position that the first sampled token will have.
        draft_token_ids: per sequence the proposed tokens, mostly empty.
    """

    sequence_ids: np.ndarray[Any, Any]
    row_starts: np.ndarray[Any, Any]
    params: Sequence[SamplingParams]
    temperatures: np.ndarray[Any, Any]
    seeds: np.ndarray[Any, Any]
    sample_indices: np.ndarray[Any, Any]
    positions: np.ndarray[Any, Any]
    draft_token_ids: Sequence[tuple[int, ...]] = ()


@dataclass(slots=True)
class SampledTokens:
    """What a sampler decided.

    Args:
        token_ids: ``[rows]`` int64 on the logits' device; row i of a sequence is the successor of its draft i.
        accepted: ``[S]`` int64 how many of a sequence's rows count (1 without drafts); None means 1 everywhere.
        failed: index of a sequence that could not be sampled -> why. Only that request fails.
        finite: ``[S]`` bool on the logits' device: False where the logits are not finite, which fails that request alone. Of a sampler
            that would have to wait for the device to know; None: none failed but those in `failed`.
    """

    token_ids: Tensor
    accepted: Tensor | None = None
    failed: Mapping[int, str] = field(default_factory=dict)
    finite: Tensor | None = None


class Sampler(ABC):
    """Chooses tokens from processed logits. Registered with ``kvloom_register_samplers``.

    Randomness is a pure function of (seed, sample index, position, stream): there is no generator to share, so neighbours,
    order, preemption and n never change a seeded result. Nothing may wait for the device: the engine does, once, at the end.
    """

    @abstractmethod
    def sample(self, logits: Tensor, rows: SamplingRows) -> SampledTokens:
        """``logits [rows, V]`` float32 -> tokens. `logits` must not be changed: log-probabilities may be taken of them."""
