"""The built-in grammar backend against the contract, and against the jsonschema package and Python's own regular expressions."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from grammar_helpers import BYTES, allowed, encode
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import RequestFailedError, RequestValidationError, UnsupportedFeatureError
from kvloom.interfaces import GrammarSpec, GrammarVocabulary
from kvloom_plugins.grammars.guidance import Guidance

REGEX = GrammarSpec("regex", r"(a|ab|é)*x?")
JSON = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}, "é": {"enum": ["a", "aa", None]}},
        "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def guidance() -> Guidance:
    return Guidance(BYTES)


def accepts(guidance: Guidance, spec: GrammarSpec, text: str) -> bool:
    """Whether the whole text may be an output."""
    matcher = guidance.compile(spec).matcher()
    try:
        matcher.advance(encode(text))
    except RequestFailedError:
        return False
    return matcher.is_complete()


@given(text=st.text("abxé", max_size=6))
def test_a_regex_takes_exactly_what_pythons_takes(guidance: Guidance, text: str) -> None:
    assert accepts(guidance, REGEX, text) == bool(re.fullmatch(REGEX.text, text))


@given(value=st.fixed_dictionaries({}, optional={"a": st.lists(st.integers(-99, 99) | st.just("a"), max_size=4), "é": st.sampled_from(["a", "aa", None, "b"]), "b": st.none()}))
def test_a_schema_takes_exactly_the_valid_values_in_its_order(guidance: Guidance, value: dict) -> None:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert accepts(guidance, GrammarSpec("json", json.dumps(JSON)), text) == jsonschema.Draft202012Validator(JSON).is_valid(value)


@given(data=st.data())
def test_masks_are_exactly_the_tokens_that_go_on(guidance: Guidance, data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from([REGEX, GrammarSpec("json", json.dumps(JSON)), GrammarSpec("choice", '["aab", "aac", "é"]')]))
    matcher, before = guidance.compile(spec).matcher(), []
    for _ in range(data.draw(st.integers(0, 8))):
        (mask,) = allowed(matcher)
        taken = set()
        for token_id in range(BYTES.size):
            trial = matcher.fork()
            if BYTES.tokens[token_id]:
                try:
                    trial.advance([token_id])
                    taken.add(token_id)
                except RequestFailedError:
                    pass
        assert mask == taken
        assert allowed(matcher) == [mask], "asking does not move it"
        if not mask:
            break
        before.append(mask)
        matcher.advance([data.draw(st.sampled_from(sorted(mask)))])
    matcher.rollback(len(before))
    assert allowed(matcher) == (before[:1] or [mask] if before else allowed(guidance.compile(spec).matcher()))


def test_drafts_have_masks_of_their_own_and_do_not_move_the_matcher(guidance: Guidance) -> None:
    matcher = guidance.compile(GrammarSpec("regex", "a[bc]d")).matcher()
    a, b, d, ab = ord("a"), ord("b"), ord("d"), 259
    assert allowed(matcher, [a, b, d]) == [{a, ab}, {b, ord("c")}, {d}, set()]
    assert allowed(matcher, [ab, d]) == [{a, ab}, {d}, set()]
    assert allowed(matcher, [a, a, b]) == [{a, ab}, {b, ord("c")}, set(), set()]
    assert allowed(matcher) == [{a, ab}]


def test_forks_and_matchers_of_one_grammar_are_independent(guidance: Guidance) -> None:
    compiled = guidance.compile(GrammarSpec("regex", "[ab]{4}"))
    first, second = compiled.matcher(), compiled.matcher()
    first.advance(encode("aba"))
    fork = first.fork()
    fork.advance(encode("b"))
    assert (fork.is_complete(), first.is_complete(), second.is_complete()) == (True, False, False)
    assert allowed(second) == allowed(compiled.matcher())
    with pytest.raises(RequestFailedError, match="not allowed here"):
        second.advance(encode("x"))
    assert allowed(second) == allowed(compiled.matcher()), "a refused token changes nothing"


def test_the_librarys_own_key_in_a_schema_changes_nothing(guidance: Guidance) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": False, "x-guidance": {"lenient": True, "whitespace_flexible": True}}
    assert not accepts(guidance, GrammarSpec("json", json.dumps(schema)), '{ "a": 1}')
    assert guidance.validate(GrammarSpec("json", json.dumps(schema | {"not": {}})))[0][:2] == ("", "not")


@pytest.mark.parametrize(("schema", "text"), [({"maxItems": 2.0, "type": "array"}, "[1,2]"), (True, "5"), ({"const": 2.0}, "2")])
def test_schemas_that_the_library_alone_refuses_are_taken(guidance: Guidance, schema, text: str) -> None:
    assert accepts(guidance, GrammarSpec("json", json.dumps(schema)), text)


def test_what_is_not_valid_cannot_be_compiled(guidance: Guidance) -> None:
    for spec in (GrammarSpec("regex", "("), GrammarSpec("json", "false"), GrammarSpec("grammar", "start: nothing"), GrammarSpec("grammar", "?")):
        assert guidance.validate(spec)
        with pytest.raises(RequestValidationError):
            guidance.compile(spec)


def test_a_vocabulary_without_an_end_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="token without text"):
        Guidance(GrammarVocabulary((b"a", b"b")))


def test_a_position_that_is_too_complex_fails_its_request(guidance: Guidance) -> None:
    matcher = guidance.compile(GrammarSpec("regex", r"(\w+\s?){1,500}[^x]{1,300}(a|b)*a(a|b){300}x")).matcher()

    def go_on() -> None:
        for text in ["ab" * 300] * 40:
            matcher.advance(encode(text))
            allowed(matcher)

    with pytest.raises(RequestFailedError):
        go_on()
