"""The llguidance library: JSON Schema, regular expressions and context-free grammars, with masks that are computed on the fly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np

from kvloom.errors import RequestFailedError, RequestValidationError, UnsupportedFeatureError
from kvloom.interfaces import CompiledGrammar, Grammar, GrammarMatcher, GrammarProblem, GrammarSpec, GrammarVocabulary
from kvloom_plugins.grammars.gbnf import to_lark
from kvloom_plugins.grammars.schema_problems import schema_problems

HEADER = '%llguidance {"no_forcing": true}\n'
"""Every token whose bytes go on with a text that is allowed: where only one text is, the library would otherwise allow one way to
cut it into tokens only."""
BASE_BYTES, BYTES_PER_CHARACTER = 2**16, 64
"""Of a compiled grammar, an upper bound: scripts/bench_grammars sees the process grow by 45 KiB for 470 characters; a schema of 120
properties takes 55 bytes a character, a choice of 3000 texts 25."""
MAX_LEXER_STATES = 20_000
"""A matcher's states take 1 to 2 kB each and come as they are reached; the schemas of the test suite reach some hundred."""

EXACT = 2**53
"""Floats below it are the integers that they look like."""


class Guidance(Grammar):
    """See `kvloom.interfaces.Grammar`."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        silent = [i for i, token in enumerate(vocabulary.tokens) if not token]
        if not silent:
            raise UnsupportedFeatureError("structured output", vocabulary.size, "a vocabulary needs a token without text, which ends")
        tokens: Any = _Tokens(vocabulary, silent)  # what the library reads of a tokenizer
        self._tokenizer = llguidance.LLTokenizer(tokens, n_vocab=vocabulary.size, eos_token=silent[0],
                                                 slices=llguidance.LLTokenizer.json_slices())
        self._limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)

    def validate(self, spec: GrammarSpec) -> list[GrammarProblem]:
        """See `Grammar.validate`."""
        try:
            reason = self._fault(_lark(spec))
        except ValueError as error:
            reason = str(error)
        if reason is None:
            return []
        if spec.kind == "json":
            return schema_problems(json.loads(spec.text), reason, lambda schema: self._fault(_json(schema, spec.whitespace)))
        return [GrammarProblem("", spec.kind, reason)]

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """See `Grammar.compile`."""
        try:
            matcher = llguidance.LLMatcher(self._tokenizer, llguidance.LLMatcher.grammar_from_lark(_lark(spec)), log_level=0,
                                           limits=self._limits)
        except ValueError as error:
            raise RequestValidationError(str(error), spec.kind, spec.text) from error
        if matcher.is_error():
            raise RequestValidationError(_phrase(matcher.get_error()), spec.kind, spec.text)
        return _Compiled(matcher, BASE_BYTES + BYTES_PER_CHARACTER * len(spec.text))

    def _fault(self, lark: str) -> str | None:
        """Why the library does not take a grammar; None when it does."""
        is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
            llguidance.LLMatcher.grammar_from_lark(lark), self._tokenizer, limits=self._limits)
        return _phrase(messages[0]) if is_error else None


class _Compiled(CompiledGrammar):
    def __init__(self, start: Any, size_bytes: int) -> None:
        self._start, self.size_bytes = start, size_bytes

    def matcher(self) -> GrammarMatcher:
        return _Matcher(self._start.deep_copy())


class _Matcher(GrammarMatcher):
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill_masks(self, masks: memoryview, draft_token_ids: Sequence[int]) -> None:
        rows = np.frombuffer(masks, np.int32).reshape(1 + len(draft_token_ids), -1)
        accepted = 0
        try:
            self._fill(rows[0])
            for token_id, row in zip(draft_token_ids, rows[1:], strict=True):
                if self._matcher.validate_tokens([token_id]) != 1 or not self._matcher.consume_token(token_id):
                    rows[1 + accepted:] = 0
                    break
                accepted += 1
                self._fill(row)
        finally:
            if accepted:
                self._matcher.rollback(accepted)

    def _fill(self, row: np.ndarray[Any, Any]) -> None:
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()

    def advance(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            if self._matcher.validate_tokens(list(token_ids)) != len(token_ids):
                raise RequestFailedError(f"the tokens {list(token_ids)[:20]} are not allowed here")
            self._matcher.consume_tokens(list(token_ids))
            self._check()

    def rollback(self, num_tokens: int) -> None:
        if num_tokens:
            self._matcher.rollback(num_tokens)
            self._check()

    def is_complete(self) -> bool:
        return bool(self._matcher.is_accepting())

    def fork(self) -> GrammarMatcher:
        return _Matcher(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestFailedError(_phrase(self._matcher.get_error()))


class _Tokens:
    """The vocabulary in the form that the library takes."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: GrammarVocabulary, silent: Sequence[int]) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = list(vocabulary.tokens), list(silent), silent[0]
        self._ids = {token: i for i, token in enumerate(vocabulary.tokens) if token}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """Some tokens of a text, the longest first. The library asks for texts that grammars name, not for the model's."""
        data, out, place = text.encode() if isinstance(text, str) else text, [], 0
        while place < len(data):
            ends = range(min(len(data), place + self._longest), place, -1)
            end = next((end for end in ends if data[place:end] in self._ids), None)
            if end is None:
                place += 1
            else:
                out.append(self._ids[data[place:end]])
                place = end
        return out


def _lark(spec: GrammarSpec) -> str:
    """A spec as the library's grammar. Raises ValueError when that cannot be."""
    if spec.kind == "json":
        return _json(json.loads(spec.text), spec.whitespace)
    if spec.kind == "regex":
        return f"{HEADER}start: /{llguidance.regex_to_lark(spec.text, use_ascii='dw')}/\n"
    if spec.kind == "choice":
        return HEADER + "start: " + " | ".join(map(json.dumps, json.loads(spec.text))) + "\n"
    return HEADER + to_lark(spec.text)


def _json(schema: Any, whitespace: str) -> str:
    if isinstance(schema, dict):  # the library's own key in a schema would override what was asked for
        options: dict[str, Any] = {"whitespace_flexible": bool(whitespace), "lenient": False, "coerce_one_of": False}
        if whitespace:
            options["whitespace_pattern"] = whitespace
        schema = _plain_integers(schema) | {"x-guidance": options}
    return f"{HEADER}start: %json {json.dumps(schema)}\n"


def _plain_integers(value: Any) -> Any:
    """With 2 for 2.0, which JSON Schema does not tell apart and the library does. The core has bounded the depth."""
    if isinstance(value, dict):
        return {key: _plain_integers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < EXACT else value


def _phrase(message: str) -> str:
    """A message of the library without its position in our text, its excerpt of that, and what follows."""
    reason = " ".join(message.partition("\n   1 | ")[0].partition("\n<")[0].split())
    where, _, rest = reason.partition(": ")
    if where.startswith("at ") and rest:
        reason = rest
    if reason == "NoExtensionBias":
        return "no text matches it"
    return reason.removeprefix("failed to compile JSON schema: ")[:500]
