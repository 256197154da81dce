"""Parameters of a request: `SamplingParams`, `BeamSearchParams` and `PoolingParams`. Field names, order and defaults are vLLM's.

Values are checked when the object is made and once more at admission (the object is mutable, as vLLM's is); the engine
works on its own copy. No NaN, no infinity, no bool where a number belongs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Self

from kvloom import other_fields
from kvloom.errors import RequestValidationError, shown
from kvloom.logs import get_logger
from kvloom.other_fields import refuses
from kvloom.param_checks import (
    check_bias,
    check_bool,
    check_callables,
    check_extra_args,
    check_ids,
    check_int,
    check_number,
    check_texts,
)
from kvloom.pooling_params import PoolingParams
from kvloom.structured_outputs import StructuredOutputsParams

MAX_SEQUENCES_PER_REQUEST = 16384
"""Bound of n and best_of."""
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy."""
MIN_TEMPERATURE = 0.01
"""Smallest temperature that is not greedy; smaller ones are raised to it."""
MAX_TEMPERATURE = 2.0
"""Largest temperature."""
MAX_STOPS = 64
"""Bound of the number of stop strings."""
MAX_BAD_WORDS = 128
"""Bound of the number of bad words."""
MAX_TEXT_LENGTH = 1024
"""Bound of the characters of a stop string or bad word."""
MAX_ID_DIGITS = 20
"""Longer texts are no token ids."""
MAX_BEAM_WIDTH = 1024
"""Bound of the beam width."""
MAX_LENGTH_PENALTY = 16.0
"""Bound of a length penalty, of either sign: powers of lengths stay finite."""
BIAS_RANGE = 100.0
"""`SamplingParams.from_optional` clamps biases to [-100, 100], as OpenAI's API does."""


class RequestOutputKind(IntEnum):
    """What each output of a request holds; `LLM` always returns FINAL_ONLY."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@refuses(other_fields.SAMPLING)
@dataclass
class SamplingParams:
    """How to generate. Positional in field order, as vLLM's.

    Args:
        n: completions to return: independent samples that share the prompt's KV blocks. Greedy ones would be equal: only 1.
        best_of: completions to sample, of which the n with the largest cumulative log-probability are returned.
        presence_penalty, frequency_penalty: taken from logits of output tokens, once or per occurrence, in [-2, 2].
        repetition_penalty: divides (if positive) or multiplies logits of prompt and output tokens; above 0, 1 is off.
        temperature: 0 is greedy; between 0 and 0.01 is raised to 0.01; at most 2.
        top_p: the smallest set of tokens with this probability, in (0, 1]; 1 is off.
        top_k: so many best tokens, ties included; -1 and 0 are off.
        min_p: tokens with this share of the best one's probability, in [0, 1]; 0 is off.
        seed: -1 and None mean: derived from the engine's seed and the request's number.
        stop: texts that end the output; the first in the list that the new text completes. They wait for min_tokens too.
        stop_token_ids: end the output; the token is kept in token_ids and left out of the text.
        bad_words: texts whose last token is forbidden where the output ends with the tokens before it.
        ignore_eos: neither the tokenizer's nor generation_config's end tokens stop; stop_token_ids still do.
        max_tokens: None means up to the model's maximum length.
        min_tokens: end-of-text and stop tokens are forbidden before; at most max_tokens.
        logprobs: candidates to return with each output token, besides itself; -1 is the whole vocabulary.
        prompt_logprobs: the same for prompt tokens; such a request does not read the prefix cache.
        detokenize: False leaves the output text empty.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: for tokenizers in Python, where special tokens are kept.
        logits_processors: functions ``(output_ids, logits [V]) -> logits`` or ``(prompt_ids, output_ids, logits) -> logits``, in
            process only. They run after logit_bias and before the penalties.
        include_stop_str_in_output: keep the stop string (or the stop token's text) in the text.
        truncate_prompt_tokens: keep only the last so many prompt tokens; -1: as many as leave room for one output token.
        output_kind: taken and copied; `LLM` returns finished outputs only.
        guided_decoding: what the output must look like, see `StructuredOutputsParams`; the older name of structured_outputs.
        logit_bias: token id -> number that is added.
        allowed_token_ids: all others are forbidden.
        extra_args: name of a logits processor -> its parameters.
        structured_outputs: what the output must look like, see `StructuredOutputsParams`.

    Raises:
        RequestValidationError: a value is out of range or of the wrong type.
        UnsupportedFeatureError: see `StructuredOutputsParams`.
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
    guided_decoding: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_optional(cls, **values: Any) -> Self:
        """The same with None for "the default"; keys of `logit_bias` may be texts, its values are clamped to [-100, 100]."""
        bias = values.get("logit_bias")
        if isinstance(bias, dict):
            values["logit_bias"] = {_as_id(i): min(BIAS_RANGE, max(-BIAS_RANGE, check_number("logit_bias", b, -1e30, 1e30)))
                                    for i, b in bias.items()}
        return cls(**{name: value for name, value in values.items() if value is not None or name == "max_tokens"})

    def validate(self) -> None:
        """Check every field and bring it to one form. Called at construction and at admission."""
        self._check_numbers()
        self._check_lengths()
        self._check_lists()
        self._check_text()
        if self.is_greedy:
            if self.num_sequences > 1:
                raise RequestValidationError("n and best_of must be 1 when temperature is 0: all greedy completions are the same",
                                             "n", self.num_sequences)
            self.top_p, self.top_k, self.min_p = 1.0, -1, 0.0
        if self.structure is not None:
            self.structure.spec()

    def _check_numbers(self) -> None:
        self.temperature = check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if GREEDY_BELOW <= self.temperature < MIN_TEMPERATURE:
            get_logger().warning("temperature raised", given=self.temperature, used=MIN_TEMPERATURE)
            self.temperature = MIN_TEMPERATURE
        self.top_p = check_number("top_p", self.top_p, 0.0, 1.0, above_low=True)
        self.top_k = check_int("top_k", self.top_k, -1)
        self.min_p = check_number("min_p", self.min_p, 0.0, 1.0)
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name), -2.0, 2.0)
        check_number("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)  # float32 divides by it
        if self.seed is not None:
            seed = check_int("seed", self.seed, -(2**63), 2**64 - 1)
            self.seed = None if seed == -1 else seed

    def _check_lengths(self) -> None:
        self.n = check_int("n", self.n, 1, MAX_SEQUENCES_PER_REQUEST)
        if self.best_of is not None:
            self.best_of = check_int("best_of", self.best_of, self.n, MAX_SEQUENCES_PER_REQUEST)
            if self.best_of != self.n and self.output_kind is RequestOutputKind.DELTA:
                raise RequestValidationError("with output_kind=DELTA best_of must equal n: the best are only known at the end",
                                             "best_of", self.best_of)
        if self.max_tokens is not None:
            self.max_tokens = check_int("max_tokens", self.max_tokens, 1)
        self.min_tokens = check_int("min_tokens", self.min_tokens, 0, self.max_tokens if self.max_tokens is not None else 2**31 - 1)
        if self.truncate_prompt_tokens is not None and check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, -1) == 0:
            raise RequestValidationError("truncate_prompt_tokens must be at least 1, or -1", "truncate_prompt_tokens", 0)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):  # vLLM's scripts say True for "that of the token itself and the best one"
                setattr(self, name, 1 if value else None)
            elif value is not None:
                setattr(self, name, check_int(name, value, -1))

    def _check_lists(self) -> None:
        self.stop_token_ids = check_ids("stop_token_ids", self.stop_token_ids)
        self.allowed_token_ids = check_ids("allowed_token_ids", self.allowed_token_ids)
        if self.allowed_token_ids == []:
            raise RequestValidationError("allowed_token_ids must name at least one token, or be None", "allowed_token_ids", [])
        if self.logit_bias is not None:
            self.logit_bias = check_bias(self.logit_bias)
        check_callables("logits_processors", self.logits_processors)
        check_extra_args("extra_args", self.extra_args)

    def _check_text(self) -> None:
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"):
            check_bool(name, getattr(self, name))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise RequestValidationError(f"output_kind must be a RequestOutputKind, got {shown(self.output_kind)}", "output_kind",
                                         self.output_kind)
        check_texts("bad_words", () if self.bad_words is None else self.bad_words, MAX_BAD_WORDS, MAX_TEXT_LENGTH)
        if self.stop_strings and not self.detokenize:
            raise RequestValidationError("stop strings are found in text, so they need detokenize=True", "stop", self.stop)

    @property
    def structure(self) -> StructuredOutputsParams | None:
        """`guided_decoding` or `structured_outputs`. Raises `RequestValidationError` when both were given, or something else."""
        if self.guided_decoding is not None and self.structured_outputs is not None:
            raise RequestValidationError("guided_decoding and structured_outputs mean the same; give one of them", "structured_outputs",
                                         self.structured_outputs)
        name = "guided_decoding" if self.structured_outputs is None else "structured_outputs"
        given = getattr(self, name)
        if given is not None and not isinstance(given, StructuredOutputsParams):
            raise RequestValidationError(f"{name} must be a StructuredOutputsParams or GuidedDecodingParams, got {shown(given)}", name,
                                         given)
        return given

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple. Raises `RequestValidationError` when it is anything but a text or a list of texts."""
        given = () if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        return check_texts("stop", given, MAX_STOPS, MAX_TEXT_LENGTH)

    @property
    def output_text_buffer_length(self) -> int:
        """Characters that a stream holds back, since they may begin a stop string."""
        return 0 if self.include_stop_str_in_output else max(map(len, self.stop_strings), default=1) - 1

    @property
    def num_sequences(self) -> int:
        """Completions to sample."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_candidates(self) -> int:
        """Candidates wanted with each output token: -1 none, 0 itself only (`best_of` ranks by it). See `with_vocabulary`."""
        if self.logprobs is not None:
            return self.logprobs
        return 0 if self.num_sequences > self.n else -1

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken."""
        return self.temperature < GREEDY_BELOW

    def clone(self) -> Self:
        """An independent copy. Functions are not copied: they may hold whatever their author likes."""
        shared = {id(f): f for f in self.logits_processors or ()}
        return copy.deepcopy(self, shared)

    def with_vocabulary(self, vocab_size: int, max_logprobs: int) -> Self:
        """A checked copy whose numbers of candidates are those of this model.

        Raises:
            RequestValidationError: more candidates than `max_logprobs` (-1: the whole vocabulary), or ids out of the vocabulary.
        """
        own = copy.copy(self)
        own.validate()  # before the deep copy: what it lets through can be copied
        own = own.clone()
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(own, name)
            if wanted is None:
                continue
            most = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
            wanted = vocab_size if wanted == -1 else min(wanted, vocab_size)
            if wanted > most:
                raise RequestValidationError(f"{name}={getattr(self, name)} asks for {wanted} candidates a token, the engine gives at "
                                             f"most {most}; raise max_logprobs of the LLM (-1: no bound)", name, getattr(self, name))
            setattr(own, name, wanted)
        bad = next((i for i in own.stop_token_ids or () if i >= vocab_size), None)
        if bad is not None:
            raise RequestValidationError(f"stop_token_ids has the token id {bad}, which is out of vocabulary: ids are 0 to "
                                         f"{vocab_size - 1}", "stop_token_ids", bad)
        return own


def _as_id(key: object) -> object:
    """A token id that JSON turned into a text is a number again; everything else is left for the check."""
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < MAX_ID_DIGITS else key


def field_names() -> list[str]:
    """Every field of `SamplingParams`, in order."""
    return [f.name for f in fields(SamplingParams)]


@refuses(other_fields.BEAMS)
@dataclass
class BeamSearchParams:
    """How to search. Positional in field order, as vLLM's.

    Args:
        beam_width: sequences that are followed and returned; each step looks at twice as many next tokens of each, so ``max_logprobs``
            bounds it.
        max_tokens: most output tokens of a sequence. Every beam runs so far, or as far as the model's length goes, unless it ends.
        ignore_eos: end tokens are tokens like others.
        temperature: log-probabilities are of logits divided by it, at most 2; 0 and 1 leave them alone.
        length_penalty: scores are cumulative log-probabilities over the number of tokens, the prompt's too, to this power, which is
            in [-16, 16].
        include_stop_str_in_output: keep the text of a final end token.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        RequestValidationError: a value is out of range or of the wrong type.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field. Called at construction and at admission."""
        self.beam_width = check_int("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        self.max_tokens = check_int("max_tokens", self.max_tokens, 1)
        self.temperature = check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise RequestValidationError(f"temperature must be 0 or at least {MIN_TEMPERATURE}, got {self.temperature}", "temperature",
                                         self.temperature)
        self.length_penalty = check_number("length_penalty", self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            check_bool(name, getattr(self, name))


__all__ = ["BeamSearchParams", "PoolingParams", "RequestOutputKind", "SamplingParams", "field_names"]
