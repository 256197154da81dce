"""What turns a prompt and its parameters into sequences for the scheduler, or refuses them. Nothing here changes the engine."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from kvloom.core import RequestSpec, check_prompt_length, root_digest
from kvloom.errors import RequestFailedError, RequestValidationError
from kvloom.interfaces import GrammarSpec, SequenceView, Tokenizer
from kvloom.params import SamplingParams
from kvloom.prompts import ParsedPrompt, check_token_ids

if TYPE_CHECKING:
    from kvloom.runtime.logits import LogitsPipeline
    from kvloom.text.grammar_gate import GrammarGate


LONGEST_TOKEN_CHARACTERS = 128
"""Texts of more characters a token than this are refused without being encoded: the longest tokens are runs of 128 spaces."""


@dataclass(frozen=True, slots=True)
class EndTokens:
    """Tokens that end a text: the tokenizer's own, and further ones of generation_config."""

    eos_token_id: int | None
    extra: frozenset[int]

    @classmethod
    def of(cls, end_token_ids: Sequence[int], tokenizer: Tokenizer | None) -> EndTokens:
        """The end of text is the tokenizer's; without one, the first of `end_token_ids`."""
        eos = tokenizer.eos_token_id if tokenizer is not None else None
        if eos is None and end_token_ids:
            eos = end_token_ids[0]
        return cls(eos, frozenset(end_token_ids) - {eos})


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
        grammars: tries grammars; None with ``skip_tokenizer_init``.
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
    grammars: GrammarGate | None = None

    def need_tokenizer(self, what: str, parameter: str = "prompt") -> Tokenizer:
        """The tokenizer. Raises `RequestValidationError` that says what needs it."""
        if self.tokenizer is None:
            raise RequestValidationError(f"Unable to get tokenizer because skip_tokenizer_init is True, and {what} need one; "
                                         "give prompt_token_ids", parameter, what)
        return self.tokenizer

    def specs(self, prompt: ParsedPrompt, params: SamplingParams, number: int, priority: int) -> list[RequestSpec]:
        """One sequence a completion; the first is the leader, whose id the others still need.

        Args:
            params: the caller's; they are checked and copied.
            number: counts requests over the life of the engine: without a seed equal prompts differ, and a rerun repeats.

        Raises:
            RequestValidationError: they cannot be served.
            RequestFailedError: a tokenizer or a logits processor raised something else.
        """
        sampling = params.with_vocabulary(self.vocab_size, self.max_logprobs)
        if sampling.stop_strings:
            self.need_tokenizer("stop strings", "stop")
        token_ids = tuple(self._encode(prompt, sampling.truncate_prompt_tokens))
        check_prompt_length(len(token_ids), self.max_model_len)
        seed = self._derived_seed(number) if sampling.seed is None else sampling.seed % 2**64
        asked = self.pipeline.ask(sampling, self.tokenizer)
        grammar = self.grammar(sampling)
        sampling.guided_decoding = sampling.structured_outputs = None  # `grammar` says it as plain data
        reads = sampling.prompt_logprobs is None
        specs = [RequestSpec(token_ids, sampling, priority, self.end_tokens.eos_token_id, self.end_tokens.extra, seed, index,
                             self._cache_root(prompt.cache_salt, number), reads or index > 0, processors=asked, grammar=grammar)
                 for index in range(sampling.num_sequences)]
        if asked:  # what processors refuse, they refuse here; the worker makes states of its own
            self.pipeline.start(SequenceView(-1, 0, token_ids, sampling, self.vocab_size, specs[0].end_token_ids), asked)
        return specs

    def grammar(self, params: SamplingParams) -> GrammarSpec | None:
        """What the request's output must be; tried out.

        Raises:
            RequestValidationError: it cannot be enforced.
        """
        if params.structure is None:
            return None
        if self.grammars is None:
            self.need_tokenizer("structured output", "structured_outputs")
            return None
        grammar = self.grammars.admit(params.structure)
        if grammar is not None and self.end_tokens.eos_token_id is None and not params.stop_token_ids:
            raise RequestValidationError("structured output ends with an end token, but neither the tokenizer nor "
                                         "generation_config.json has one: name one in stop_token_ids", "structured_outputs")
        return grammar

    def _derived_seed(self, number: int) -> int:
        return int.from_bytes(blake2b(struct.pack("<QQ", self.seed % 2**64, number), digest_size=8).digest(), "little")

    def _cache_root(self, salt: str, number: int) -> bytes:
        # Without a prefix cache no two requests may meet, but the completions of one do.
        return root_digest(self.model_revision, cache_salt=salt, media=() if self.cached else (f"request {number}",))

    def _bounded(self, text: str, keep_tokens: int | None) -> str:
        """A text of a length that is worth encoding, which takes a second per megabyte: its end, where only that is wanted."""
        most = self.max_model_len * LONGEST_TOKEN_CHARACTERS
        if len(text) > most and keep_tokens is None:
            raise RequestValidationError(f"The prompt has {len(text)} characters, which is longer than the maximum model length of "
                                         f"{self.max_model_len} tokens can hold ({most}).", "prompt", len(text))
        return text[-most:]

    def _encode(self, prompt: ParsedPrompt, keep_tokens: int | None) -> Sequence[int]:
        token_ids: Sequence[int] | None = prompt.token_ids
        if token_ids is None:
            tokenizer, text = self.need_tokenizer("text prompts"), self._bounded(prompt.text or "", keep_tokens)
            try:
                token_ids = tokenizer.encode(text)
            except Exception as error:
                raise RequestFailedError(f"the tokenizer raised {type(error).__name__}: {error}") from error
        if not token_ids:
            raise RequestValidationError("The prompt cannot be empty: the tokenizer made no token of it", "prompt", prompt.text)
        check_token_ids(token_ids, self.vocab_size)
        if keep_tokens is None:
            return token_ids
        return token_ids[-(self.max_model_len - 1 if keep_tokens == -1 else keep_tokens):]
