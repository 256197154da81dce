"""What turns a prompt and its parameters into sequences for the scheduler, or refuses them. Nothing here changes the engine."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeVar

from kvloom.config.pooling import GENERATE
from kvloom.core import RequestSpec, check_prompt_length, root_digest
from kvloom.decoding import Decoding, begin
from kvloom.errors import InternalError, RequestFailedError, RequestValidationError, UnsupportedFeatureError
from kvloom.interfaces import GrammarSpec, SequenceView, Tokenizer
from kvloom.params import PoolingParams, SamplingParams
from kvloom.pooling_rules import PoolingRules
from kvloom.prompts import ParsedPrompt, Truncation, check_extras, check_token_ids
from kvloom.wrong_task import check_method

if TYPE_CHECKING:
    from kvloom.runtime.logits import LogitsPipeline
    from kvloom.text.grammar_gate import GrammarGate


LONGEST_TOKEN_CHARACTERS = 128
"""Texts of more characters a token than this are refused without being encoded: the longest tokens are runs of 128 spaces."""


CUT_TEXT_FACTOR = 16
"""How much longer a text may be whose end the tokenizer cuts off: it encodes all of it first."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EndTokens:
    """Tokens that end a text: the tokenizer's own, and further ones of generation_config.

    Args:
        configured: what config.json and generation_config say, whatever the tokenizer.
    """

    eos_token_id: int | None
    extra: frozenset[int]
    configured: tuple[int, ...] = ()

    @classmethod
    def of(cls, end_token_ids: Sequence[int], tokenizer: Tokenizer | None) -> EndTokens:
        """The end of text is the tokenizer's; without one, the first of `end_token_ids`."""
        eos = tokenizer.eos_token_id if tokenizer is not None else None
        if eos is None and end_token_ids:
            eos = end_token_ids[0]
        return cls(eos, frozenset(end_token_ids) - {eos}, tuple(end_token_ids))


@dataclass(frozen=True, slots=True)
class RequestRules:
    """Of one engine.

    Args:
        seed: the engine's, for requests without one.
        model_revision: what the prefix cache's keys begin with.
        vocab_size: ids that the model embeds.
        max_model_len: tokens of the longest sequence.
        max_logprobs: most candidates of a token; -1 is the whole vocabulary.
        cached: whether requests share prefixes. If not, siblings of one request still do.
        end_tokens: see `EndTokens`.
        tokenizer: None with ``skip_tokenizer_init``.
        pipeline: the logits processors.
        extra_inputs: see `Model.extra_inputs`.
        grammars: tries grammars; None with ``skip_tokenizer_init``.
        pooling: of an engine that pools; None: it generates.
    """

    seed: int
    model_revision: str
    vocab_size: int
    max_model_len: int
    max_logprobs: int
    cached: bool
    end_tokens: EndTokens
    tokenizer: Tokenizer | None
    pipeline: LogitsPipeline
    extra_inputs: Mapping[str, int] = field(default_factory=dict)
    grammars: GrammarGate | None = None
    pooling: PoolingRules | None = None

    @property
    def task(self) -> str:
        """What the engine is for."""
        return GENERATE if self.pooling is None else self.pooling.task

    def need_pooling(self, method: str = "encode") -> PoolingRules:
        """Raises `RequestValidationError` in an engine that does not have this method of `LLM`."""
        check_method(method, self.task)
        if self.pooling is None:
            raise InternalError(f"{method} is said to be served with task={self.task!r}")
        return self.pooling

    def need_tokenizer(self, what: str, parameter: str = "prompt", instead: str = "give prompt_token_ids") -> Tokenizer:
        """The tokenizer. Raises `RequestValidationError` that says what needs it, and what does not."""
        if self.tokenizer is None:
            raise RequestValidationError(f"Unable to get tokenizer because skip_tokenizer_init is True: {what} cannot do without; "
                                         f"{instead}, or make the LLM without skip_tokenizer_init", parameter, what)
        return self.tokenizer

    def need_grammars(self) -> GrammarGate:
        """What tries grammars. Raises `RequestValidationError` where there is no tokenizer."""
        self.need_tokenizer("structured output", "structured_outputs", "leave it out")
        if self.grammars is None:
            raise InternalError("there is a tokenizer, but nothing that tries grammars")
        return self.grammars

    def with_tokenizer(self, tokenizer: Tokenizer, grammars: GrammarGate) -> RequestRules:
        """The same rules with another tokenizer, and what tries grammars over its tokens.

        Raises:
            RequestValidationError: it knows ids that the model does not.
        """
        if tokenizer.vocab_size > self.vocab_size:
            raise RequestValidationError(f"the tokenizer knows token ids up to {tokenizer.vocab_size - 1}, the model's are 0 to "
                                         f"{self.vocab_size - 1}; give the tokenizer that the model was trained with", "tokenizer",
                                         tokenizer.vocab_size)
        return replace(self, tokenizer=tokenizer, grammars=grammars, end_tokens=EndTokens.of(self.end_tokens.configured, tokenizer))

    def specs(self, prompt: ParsedPrompt, params: SamplingParams | PoolingParams | Decoding, number: int,
              priority: int) -> list[RequestSpec]:
        """One sequence a completion; the first is the leader, whose id the others still need.

        Args:
            params: the caller's; they are checked and copied.
            number: counts requests over the life of the engine: without a seed equal prompts differ, and a rerun repeats.

        Raises:
            RequestValidationError: they cannot be served.
            RequestFailedError: a tokenizer or a logits processor raised something else.
        """
        if isinstance(params, PoolingParams):
            return [self._pooled(prompt, params, number, priority)]
        check_method("generate", self.task)
        if isinstance(params, Decoding):
            return [self.branching(prompt, params, number, priority)]
        sampling = params.with_vocabulary(self.vocab_size, self.max_logprobs)
        if sampling.stop_strings:
            self.need_tokenizer("a stop string", "stop", "give stop_token_ids")
        cut = _truncation(prompt, sampling)
        token_ids = tuple(self._encode(prompt, cut))
        check_prompt_length(len(token_ids), self.max_model_len)
        extras = self._extras(prompt, len(token_ids), cut)
        seed = self._derived_seed(number) if sampling.seed is None else sampling.seed % 2**64
        asked = self.pipeline.ask(sampling, self.tokenizer)
        grammar = self.grammar(sampling)
        sampling.guided_decoding = sampling.structured_outputs = None  # `grammar` says it as plain data
        reads = sampling.prompt_logprobs is None
        specs = [RequestSpec(token_ids, sampling, priority, self.end_tokens.eos_token_id, self.end_tokens.extra, seed, index,
                             self._cache_root(prompt, number), reads or index > 0, processors=asked, grammar=grammar, extras=extras)
                 for index in range(sampling.num_sequences)]
        if asked:  # what processors refuse, they refuse here; the worker makes states of its own
            self.pipeline.start(SequenceView(-1, 0, token_ids, sampling, self.vocab_size, specs[0].end_token_ids), asked)
        return specs

    def branching(self, prompt: ParsedPrompt, decoding: Decoding, number: int, priority: int) -> RequestSpec:
        """The sequence that a request with a decoder begins with.

        Raises:
            RequestValidationError, RequestTypeError: it cannot be served.
            RequestFailedError: the tokenizer or the decoder raised something else.
        """
        token_ids = tuple(self._encode(prompt, None))
        check_prompt_length(len(token_ids), self.max_model_len)
        ends = self.end_tokens
        eos = frozenset[int]() if ends.eos_token_id is None else frozenset({ends.eos_token_id})
        rule = begin(decoding, token_ids, eos | ends.extra, max_model_len=self.max_model_len, vocab_size=self.vocab_size,
                     max_logprobs=self.max_logprobs)
        # Candidates come with the most probable token, which greedy sampling gives; which ones are taken, the decoder decides.
        sampling = SamplingParams(temperature=0, max_tokens=rule.needs.max_tokens, logprobs=rule.needs.candidates_per_row,
                                  ignore_eos=True, detokenize=self.tokenizer is not None)
        return RequestSpec(token_ids, sampling, priority, ends.eos_token_id, ends.extra,
                           cache_root=self._cache_root(prompt, number), branching=rule)

    def grammar(self, params: SamplingParams) -> GrammarSpec | None:
        """What the request's output must be; tried out.

        Raises:
            RequestValidationError: it cannot be enforced.
        """
        if params.structure is None:
            return None
        grammar = self.need_grammars().admit(params.structure)
        if grammar is not None and self.end_tokens.eos_token_id is None and not params.stop_token_ids:
            raise RequestValidationError("structured output ends with an end token, but neither the tokenizer nor "
                                         "generation_config.json has one: name one in stop_token_ids", "structured_outputs")
        return grammar

    def _pooled(self, prompt: ParsedPrompt, params: PoolingParams, number: int, priority: int) -> RequestSpec:
        rules = self.need_pooling()
        pooling = rules.checked(params)
        cut = _truncation(prompt, pooling)
        token_ids = tuple(self._encode_whole(prompt, cut))
        check_prompt_length(len(token_ids), self.max_model_len, output_tokens=False)
        rules.check_start(pooling, token_ids)
        return RequestSpec(token_ids, None, priority, cache_root=self._cache_root(prompt, number), pooling=pooling,
                           read_prefix_cache=rules.reads_prefix_cache(pooling), extras=self._extras(prompt, len(token_ids), cut))

    def _extras(self, prompt: ParsedPrompt, num_tokens: int, cut: Truncation | None = None) -> dict[str, tuple[int, ...]]:
        check_extras(prompt.extras, self.extra_inputs)
        kept = (cut or Truncation(num_tokens)).kept(num_tokens)
        return {name: values[kept] for name, values in prompt.extras.items()}

    def _derived_seed(self, number: int) -> int:
        return int.from_bytes(blake2b(struct.pack("<QQ", self.seed % 2**64, number), digest_size=8).digest(), "little")

    def _cache_root(self, prompt: ParsedPrompt, number: int) -> bytes:
        # Without a prefix cache no two requests may meet, but the completions of one do.
        alone = () if self.cached else (f"request {number}",)
        extras = tuple(f"{name} {values}" for name, values in prompt.extras.items())
        return root_digest(self.model_revision, cache_salt=prompt.cache_salt, media=(*alone, *extras))

    def _bounded(self, text: str, cut: Truncation | None, factor: int = 1) -> str:
        """A text of a length that is worth encoding, which takes a second per megabyte: the part that is wanted.

        Args:
            factor: of what is too long.
        """
        most = self.max_model_len * LONGEST_TOKEN_CHARACTERS * factor
        if len(text) > most and cut is None:
            raise RequestValidationError(f"The prompt has {len(text)} characters, which is longer than the maximum model length of "
                                         f"{self.max_model_len} tokens can hold ({most}).", "prompt", len(text))
        return text[(cut or Truncation(most)).kept(most)]

    def _encode_whole(self, prompt: ParsedPrompt, cut: Truncation | None) -> Sequence[int]:
        """Ids of a prompt that is pooled: a text that is too long loses its end, or what the tokenizer cuts, not its special tokens."""
        if cut is None:
            return self._encode(prompt, None)
        most = self._most(cut)
        if prompt.token_ids is not None:
            return self._encode(prompt, replace(cut, tokens=most))
        tokenizer, text = self.need_tokenizer("a text prompt"), self._bounded(prompt.text or "", None, CUT_TEXT_FACTOR)
        token_ids = self.guarded(lambda: tokenizer.encode_within(text, most, keep_end=cut.keep_end))
        return self._encode(replace(prompt, token_ids=tuple(token_ids)), None) if token_ids else self._encode(prompt, None)

    def _most(self, cut: Truncation) -> int:
        """Tokens that a prompt which is pooled may keep."""
        if cut.tokens > self.max_model_len:
            raise RequestValidationError(f"truncate_prompt_tokens={cut.tokens} is more than the maximum model length of "
                                         f"{self.max_model_len} tokens; -1 keeps as many as the model can take",
                                         "truncate_prompt_tokens", cut.tokens)
        return self.max_model_len if cut.tokens == -1 else cut.tokens

    def encode_pair(self, text: str, pair: str, cut: Truncation | None) -> ParsedPrompt:
        """Two texts as the prompt of a cross-encoder.

        Raises:
            RequestValidationError: no tokenizer, or one that cannot cut so far.
        """
        tokenizer = self.need_tokenizer("a pair of texts", instead="give classify prompt_token_ids that hold both")
        first, second = (self._bounded(t, None, 1 if cut is None else CUT_TEXT_FACTOR) for t in (text, pair))
        most, keep_end = (None, None) if cut is None else (self._most(cut), cut.keep_end)
        found = self.guarded(lambda: tokenizer.encode_pair(first, second, most, keep_end=keep_end))
        extras = {"token_type_ids": tuple(found.token_type_ids)} if found.token_type_ids else {}
        return ParsedPrompt(None, tuple(found.token_ids), extras={n: v for n, v in extras.items() if n in self.extra_inputs})

    @staticmethod
    def guarded(encode: Callable[[], T]) -> T:
        """What a tokenizer gives. Its `ValueError` is a bad request, whatever else it raises a failed one."""
        try:
            return encode()
        except UnsupportedFeatureError:
            raise
        except ValueError as error:
            raise RequestValidationError(f"the tokenizer refuses the text: {error}", "truncate_prompt_tokens") from error
        except Exception as error:
            raise RequestFailedError(f"the tokenizer raised {type(error).__name__}: {error}") from error

    def _encode(self, prompt: ParsedPrompt, cut: Truncation | None) -> Sequence[int]:
        token_ids: Sequence[int] | None = prompt.token_ids
        if token_ids is None:
            tokenizer, text = self.need_tokenizer("a text prompt"), self._bounded(prompt.text or "", cut)
            try:
                token_ids = tokenizer.encode(text)
            except Exception as error:
                raise RequestFailedError(f"the tokenizer raised {type(error).__name__}: {error}") from error
        if not token_ids:
            raise RequestValidationError("The prompt cannot be empty: the tokenizer made no token of it", "prompt", prompt.text)
        check_token_ids(token_ids, self.vocab_size)
        if cut is None:
            return token_ids
        kept = self.max_model_len - 1 if cut.tokens == -1 else cut.tokens
        return token_ids[cut.kept(kept)]


def _truncation(prompt: ParsedPrompt, params: SamplingParams | PoolingParams) -> Truncation | None:
    """What the call says of a prompt, or its parameters. Raises `RequestValidationError` when both do."""
    tokens = params.truncate_prompt_tokens
    if prompt.truncation is not None and tokens is not None:
        raise RequestValidationError("both tokenization_kwargs and truncate_prompt_tokens say how to cut the prompt: give one of them",
                                     "truncate_prompt_tokens", tokens)
    return prompt.truncation if tokens is None else Truncation(tokens)
