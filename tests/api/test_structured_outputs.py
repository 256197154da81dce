"""Structured output, end to end: what comes out is what was asked for, whatever else the request wants."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pydantic
import pytest
import torch
from api_helpers import Truth, assert_idle, ids, lively_checkpoint, recorded_steps, run, writes

import kvloom.sampling_params
from kvloom import LLM, GuidedDecodingParams, SamplingParams, StructuredOutputsParams
from kvloom.core.scheduler import Scheduler
from kvloom.core.wire import from_wire, to_wire
from kvloom.errors import ConfigError, RequestFailedError, RequestTypeError, RequestValidationError, UnsupportedFeatureError
from kvloom.structured_outputs import GuidedDecodingRequest
from kvloom.testing.checkpoints import EOS

PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
          "required": ["name", "age"], "additionalProperties": False}
PROMPT = [5, 6, 7, 7, 100, 3]


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32", max_model_len=300) as made:
        yield made


def asking(seed: int = 0, /, **kwargs) -> SamplingParams:
    """Parameters with a grammar: fields of `SamplingParams` where they are some, else of `StructuredOutputsParams`."""
    own = {k: kwargs.pop(k) for k in list(kwargs) if k in StructuredOutputsParams.__dataclass_fields__}
    return SamplingParams(**{"max_tokens": 290, "seed": seed, "structured_outputs": StructuredOutputsParams(**own)} | kwargs)


def texts(llm: LLM, *params: SamplingParams) -> list[str]:
    """Of complete outputs."""
    outputs = [c for o in run(llm, [PROMPT] * len(params), list(params)) for c in o.outputs]
    assert [(o.finish_reason, o.stop_reason) for o in outputs] == [("stop", None)] * len(outputs)
    assert all(o.token_ids[-1] == EOS for o in outputs)
    return [o.text for o in outputs]


def refusal(parameter: str | None, **kwargs) -> str:
    with pytest.raises(RequestValidationError) as caught:
        StructuredOutputsParams(**kwargs)
    assert caught.value.parameter == parameter
    return str(caught.value)


# -- the kinds

class Person(pydantic.BaseModel, extra="forbid"):
    name: str = pydantic.Field(max_length=5)
    age: int = pydantic.Field(ge=0, le=9)


@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON), Person, {"type": "array", "items": {"enum": [1, "a", None]}, "minItems": 2, "maxItems": 3},
                                    {"$ref": "#/$defs/x", "$defs": {"x": {"const": {"é": [1.5, False]}}}}, {"anyOf": [{"type": "boolean"}, {"type": "null"}]}], ids=repr)
def test_structured_outputs_json__the_output_is_valid(llm: LLM, schema) -> None:
    data = Person.model_json_schema() if schema is Person else json.loads(schema) if isinstance(schema, str) else schema
    for text in texts(llm, *(asking(seed, json=schema) for seed in range(6))):
        jsonschema.validate(json.loads(text), data)


def test_structured_outputs_json__objects_texts_and_classes_mean_the_same(llm: LLM) -> None:
    ways = [Person, Person.model_json_schema(), json.dumps(Person.model_json_schema())]
    assert len({StructuredOutputsParams(json=way).spec() for way in ways}) == 1


@pytest.mark.parametrize("regex", ["[a-c]{3,5}x", r"\d+\.\d{2}", "(yes|no) [^a-z]{2}", "é{2}|ü", "a/b\\\\", r"(?i)hello", "^x?y$"])
def test_structured_outputs_regex__the_whole_output_matches(llm: LLM, regex: str) -> None:
    for text in texts(llm, *(asking(seed, regex=regex) for seed in range(4))):
        assert re.fullmatch(regex, text)


def test_structured_outputs_choice__the_output_is_one_of_them(llm: LLM) -> None:
    choices = ["yes", "no", "yes, but", 'say "x"\n', "ünder", "🙂\\", "a\x7fb"]
    found = set(texts(llm, *(asking(seed, choice=choices) for seed in range(24))))
    assert found <= set(choices)
    assert len(found) > 1
    (only,) = texts(llm, asking(choice=["only this"], temperature=0))
    assert only == "only this"


@pytest.mark.parametrize("grammar", [
    'root ::= item ("," item)?\nitem ::= [0-9] | "(" root ")"', 'start: item ("," item)?\nitem: /[0-9]/ | "(" start ")"', "start: INNER+\nINNER: /[ab]/"])
def test_structured_outputs_grammar__gbnf_and_lark_are_taken(llm: LLM, grammar: str) -> None:
    for seed in range(4):
        (output,) = run(llm, [PROMPT], asking(seed, grammar=grammar, max_tokens=150))
        assert re.fullmatch(r"[0-9(),]+|[ab]+", output.outputs[0].text)


def test_structured_outputs_json_object__the_output_is_an_object(llm: LLM) -> None:
    params = [asking(seed, json_object=True, logit_bias={ord("}"): 8.0, ord('"'): 5.0}) for seed in range(4)]
    assert all(isinstance(json.loads(text), dict) for text in texts(llm, *params))
    assert StructuredOutputsParams(json_object=True).spec() == StructuredOutputsParams(json={"type": "object"}).spec()._replace(text='{"type":"object"}')


def test_structured_outputs_backend__is_the_engines_with_options(llm: LLM) -> None:
    for backend in ("guidance", "auto", "guidance:no-fallback"):
        assert texts(llm, asking(regex="ab", backend=backend)) == ["ab"]
    assert StructuredOutputsParams(json=PERSON, backend="auto:disable-any-whitespace").spec().whitespace == ""
    assert '"additionalProperties": false' in StructuredOutputsParams(json={"type": "object"}, backend="guidance:no-additional-properties").spec().text
    with pytest.raises(RequestValidationError, match="the grammar backend 'xgrammar', but the engine's is 'guidance'"):
        run(llm, [PROMPT], asking(regex="ab", backend="xgrammar"))
    assert "no option of a grammar backend" in refusal("backend", regex="a", backend="guidance:faster")
    assert_idle(llm)


def test_structured_outputs_whitespace_pattern__says_what_may_stand_between_tokens(llm: LLM) -> None:
    def spaces(**options) -> set[str]:
        found = texts(llm, *(asking(seed, json=PERSON, logit_bias={ord(" "): 4.0, ord("\n"): 4.0}, **options) for seed in range(6)))
        return {re.search(r'^\{([ \n\t\r]*)"name"', text)[1] for text in found}

    assert spaces(whitespace_pattern="") == {""}
    assert spaces(whitespace_pattern=" ") <= {"", " "}
    assert max(map(len, spaces())) > 1, "any whitespace, but not without end"
    assert max(map(len, spaces())) <= 24
    assert "give one of them" in refusal("whitespace_pattern", json=PERSON, whitespace_pattern=" ", disable_any_whitespace=True)
    assert "belongs to json" in refusal("whitespace_pattern", regex="a", whitespace_pattern=" ")


def test_structured_outputs_disable_any_whitespace__is_compact_json(llm: LLM, checkpoint: Path) -> None:
    for text in texts(llm, *(asking(seed, json=PERSON, disable_any_whitespace=True) for seed in range(4))):
        assert text == json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False) or "\\" in text
    assert refusal("disable_any_whitespace", json=PERSON, disable_any_whitespace=1)


def test_structured_outputs_disable_additional_properties__closes_objects_that_say_nothing(llm: LLM) -> None:
    inner = {"type": "object", "properties": {"b": {"type": "boolean"}}, "additionalProperties": True}
    schema = {"type": "object", "properties": {"a": {"const": 1}, "in": inner}, "required": ["a"]}
    spec = StructuredOutputsParams(json=schema, disable_additional_properties=True).spec()
    assert json.loads(spec.text) == schema | {"additionalProperties": False}
    assert "additionalProperties" not in schema
    for text in texts(llm, *(asking(seed, json={**schema, "properties": {"a": {"const": 1}}}, disable_additional_properties=True) for seed in range(4))):
        assert json.loads(text) == {"a": 1}


def test_structured_outputs_structural_tag__is_refused_so_far() -> None:
    with pytest.raises(UnsupportedFeatureError, match="structural_tag"):
        StructuredOutputsParams(structural_tag="{}")


# -- bad ones

def deep(levels: int) -> dict:
    return {"type": "object"} if not levels else {"properties": {"a": deep(levels - 1)}}


def shared(levels: int) -> dict:
    inner: dict = {"type": "string"}
    for _ in range(levels):
        inner = {"anyOf": [inner, inner]}
    return inner


@pytest.mark.parametrize(("parameter", "given", "message"), [
    ("structured_outputs", {}, "must be given"), ("choice", {"regex": "a", "choice": ["b"]}, "multiple are specified"),
    ("regex", {"regex": ""}, "1 to"), ("regex", {"regex": "a\0"}, "NUL"), ("regex", {"regex": 5}, "text"), ("regex", {"regex": "\ud800"}, "surrogate"),
    ("grammar", {"grammar": ""}, "1 to"), ("json", {"json": ""}, "1 to"), ("json", {"json": "{"}, "no JSON text"), ("json", {"json": "NaN"}, "no JSON"),
    ("json", {"json": 5}, "JSON Schema"), ("json", {"json": "[]"}, "object, true or false"), ("json", {"json": {"const": math.nan}}, "no JSON Schema"), ("json", {"json": {"const": {1, 2}}}, "no JSON Schema"),
    ("json", {"json": deep(40)}, "nested more than 64"), ("json", {"json": "[" * 10_000}, "no JSON text"),
    ("json", {"json": "x" * 2**19}, "at most|1 to"), ("json", {"json": {"enum": ["x" * 2**18]}}, "at most"), ("json", {"json": object}, "JSON Schema"),
    ("choice", {"choice": []}, "at least one"), ("choice", {"choice": "ab"}, "list"), ("choice", {"choice": [1]}, "list"), ("choice", {"choice": ["a", ""]}, "empty"), ("choice", {"choice": ["a" * 2**19]}, "more than"),
    ("json_object", {"json_object": False}, "must be True"), ("json_object", {"json_object": 1}, "must be True"), ("disable_additional_properties", {"json_object": True, "disable_additional_properties": True}, "any object"),
], ids=lambda v: str(v)[:30])
def test_a_bad_grammar_is_refused_when_it_is_made(parameter: str, given: dict, message: str) -> None:
    assert re.search(message, refusal(parameter, **given))


def test_a_schema_that_holds_itself_or_the_same_many_times_is_refused() -> None:
    schema: dict = {"type": "object"}
    schema["properties"] = {"a": schema}
    assert "nested more than 64" in refusal("json", json=schema)
    assert "more than 131072 values" in refusal("json", json=shared(25))


@pytest.mark.parametrize("given", [{"json": {"$ref": "#"}}, {"grammar": 'root ::= root "a"'}], ids=str)
def test_what_no_text_matches_is_refused(llm: LLM, given: dict) -> None:
    with pytest.raises(RequestValidationError, match="structured output: no text matches it"):
        texts(llm, asking(**given))
    assert_idle(llm)


@pytest.mark.parametrize(("given", "where", "keyword"), [
    ({"json": {"properties": {"a/b": {"type": "array", "items": {"not": {"const": 1}}}}}}, "/properties/a~1b/items", "not"),
    ({"json": {"$defs": {"u": {"uniqueItems": True}, "v": {"uniqueItems": True}}, "anyOf": [{"type": "null"}, {"$ref": "#/$defs/v"}]}}, "/$defs/v", "uniqueItems"),
    ({"json": {"items": {"type": "string", "format": "regex"}}}, "/items", "format"), ({"json": {"properties": {"x": {"$ref": "http://x.test/y.json"}}}}, "/properties/x", "$ref"),
    ({"json": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}, "the top", "oneOf"), ({"json": {"items": {"maxLength": 2.5}}}, "/items", "maxLength"),
    ({"regex": "a("}, "the top", "regex"), ({"regex": "(?=a)b"}, "the top", "regex"), ({"grammar": "nonsense"}, "the top", "grammar"), ({"grammar": 'root ::= "a" other'}, "the top", "grammar"),
    ({"grammar": "start: <|special|>"}, "", ""), ({"json": False}, "the top", "schema"), ({"json": {"type": "strin"}}, "the top", "type"),
], ids=str)
def test_what_cannot_be_enforced_is_refused_with_place_and_keyword(llm: LLM, given: dict, where: str, keyword: str) -> None:
    with recorded_steps(llm) as steps, pytest.raises(RequestValidationError, match="cannot be used for structured output") as caught:
        run(llm, [PROMPT, PROMPT], [SamplingParams(), asking(**given)])
    assert not steps
    assert_idle(llm)
    assert f"at {where}, {keyword}: " in str(caught.value) or not where
    assert texts(llm, asking(regex="ab")) == ["ab"]


def test_validate_grammar__lists_everything_that_cannot_be_enforced(llm: LLM) -> None:
    schema = {"properties": {"a": {"not": {}, "if": {}, "then": {}}, "b": {"oneOf": [{"type": "string"}, {"maxLength": 1}]}, "c": {"type": "string"}}, "uniqueItems": True}
    assert sorted(p[:2] for p in llm.validate_grammar(StructuredOutputsParams(json=schema))) == [
        ("", "uniqueItems"), ("/properties/a", "if"), ("/properties/a", "not"), ("/properties/a", "then"), ("/properties/b", "oneOf")]
    assert llm.validate_grammar(StructuredOutputsParams(json=PERSON)) == []


@pytest.mark.parametrize("wrong", [PERSON, "a+", None], ids=["a schema", "a pattern", "nothing"])
def test_validate_grammar__takes_what_a_request_takes(llm: LLM, wrong: object) -> None:
    with pytest.raises(RequestTypeError, match=r"must be StructuredOutputsParams, got .*StructuredOutputsParams\(json=schema\)"):
        llm.validate_grammar(wrong)
    assert llm.validate_grammar(StructuredOutputsParams(regex="a+")) == []


# -- how it is asked for

def test_guided_decoding__is_the_older_name(llm: LLM) -> None:
    asked = SamplingParams(guided_decoding=GuidedDecodingParams(regex="ab{2}"), max_tokens=20)
    assert texts(llm, asked) == ["abb"]
    assert asked.guided_decoding == GuidedDecodingParams(regex="ab{2}"), "the caller's own is not changed"
    assert len(run(llm, [PROMPT], SamplingParams(guided_decoding=GuidedDecodingParams(), max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids) == 3
    assert GuidedDecodingParams.from_optional(json=None, regex=None) is None
    assert GuidedDecodingParams.from_optional(json=Person, regex=None).json == Person.model_json_schema()
    for bad in ({"regex": "a+"}, "a+", object()):
        with pytest.raises(RequestValidationError, match="must be a StructuredOutputsParams"):
            SamplingParams(guided_decoding=bad)
    assert kvloom.sampling_params.GuidedDecodingParams is GuidedDecodingParams


def test_structured_outputs__both_names_at_once_are_refused_and_changes_are_checked_again(llm: LLM) -> None:
    with pytest.raises(RequestValidationError, match="mean the same"):
        SamplingParams(guided_decoding=GuidedDecodingParams(regex="a"), structured_outputs=StructuredOutputsParams(regex="a"))
    params = asking(regex="a")
    params.structured_outputs.choice = ["b"]
    with pytest.raises(RequestValidationError, match="multiple"):
        run(llm, [PROMPT], params)


@pytest.mark.parametrize("request_of", [lambda: {"guided_regex": "ab"}, lambda: {"guided_choice": ["ab"]}, lambda: {"guided_json": {"const": "ab"}},
                                        lambda: GuidedDecodingRequest(guided_grammar='root ::= "ab"', guided_decoding_backend="guidance")])
def test_generate__guided_options_request_warns_and_works(llm: LLM, request_of) -> None:
    with pytest.warns(DeprecationWarning, match="guided_options_request"):
        (output,) = llm.generate([PROMPT], SamplingParams(), use_tqdm=False, guided_options_request=request_of())
    assert output.outputs[0].text.strip('"') == "ab"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_generate__bad_guided_options_requests_are_refused(llm: LLM) -> None:
    for bad, message in (({"guided_regex": "a", "guided_choice": ["b"]}, "multiple"), ({"guided_regexp": "a"}, "guided_regexp"), (GuidedDecodingRequest("{}", "a"), "multiple")):
        with pytest.raises(RequestValidationError, match=message):
            llm.generate([PROMPT], SamplingParams(), use_tqdm=False, guided_options_request=bad)
    with pytest.raises(RequestTypeError, match="guided_options_request must be a dict"):
        llm.generate([PROMPT], SamplingParams(), use_tqdm=False, guided_options_request="a")
    with pytest.raises(RequestValidationError, match="Cannot set both"):
        llm.generate([PROMPT], asking(regex="a"), use_tqdm=False, guided_options_request={"guided_regex": "a"})
    assert_idle(llm)


def test_guided_decoding_backend__chooses_and_sets_options(checkpoint: Path) -> None:
    with LLM(str(checkpoint), dtype="float32", guided_decoding_backend="guidance:disable-any-whitespace") as llm:
        for text in texts(llm, *(asking(seed, json=PERSON) for seed in range(4))):
            assert text.startswith('{"name":"')
    with pytest.raises(ConfigError, match=r"(?s)guided_decoding_backend='xgrammar'.*guidance"):
        LLM(str(checkpoint), guided_decoding_backend="xgrammar")
    with pytest.raises(ConfigError, match="no option of a grammar backend"):
        LLM(str(checkpoint), guided_decoding_backend="auto:quickly")


def test_structured_output_needs_a_tokenizer(checkpoint: Path) -> None:
    with LLM(str(checkpoint), dtype="float32", skip_tokenizer_init=True) as llm:
        with pytest.raises(RequestValidationError, match="skip_tokenizer_init"):
            run(llm, [PROMPT], asking(regex="a"))
        with pytest.raises(RequestValidationError, match="skip_tokenizer_init"):
            llm.validate_grammar(StructuredOutputsParams(regex="a"))


# -- with everything else

def test_log_probabilities_see_the_mask(llm: LLM, truth: Truth) -> None:
    (output,) = run(llm, [PROMPT], asking(regex="[abc]x", logprobs=3, temperature=0))
    first = output.outputs[0].logprobs[0]
    allowed = truth.after(output.prompt_token_ids)[[ord(c) for c in "abc"]]
    expected = allowed.log_softmax(-1)
    assert {i: pytest.approx(expected["abc".index(chr(i))].item(), abs=1e-4) for i in (97, 98, 99)} == {i: first[i].logprob for i in (97, 98, 99)}
    assert output.outputs[0].logprobs[1][ord("x")].logprob == pytest.approx(0)
    assert output.outputs[0].token_ids[0] == 97 + int(allowed.argmax())


def test_each_completion_and_each_request_has_a_grammar_of_its_own(llm: LLM) -> None:
    many, free = asking(regex="[a-z]{1,6}!", n=6), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = run(llm, [PROMPT, PROMPT, [1, 2]], [many, free, asking(7, json=PERSON)])
    found = [c.text for c in outputs[0].outputs]
    assert all(re.fullmatch("[a-z]{1,6}!", text) for text in found)
    assert len(set(found)) > 2
    assert list(outputs[1].outputs[0].token_ids) == ids(run(llm, [PROMPT], free))[0], "rows without a grammar are untouched"
    jsonschema.validate(json.loads(outputs[2].outputs[0].text), PERSON)


def test_end_of_text_comes_only_where_the_output_is_complete(llm: LLM) -> None:
    wants_to_end = {"logit_bias": {EOS: 50.0}, "temperature": 0}
    assert texts(llm, asking(regex="a{3,9}", **wants_to_end), asking(json=PERSON, disable_any_whitespace=True, **wants_to_end)) [0] == "aaa"
    with pytest.raises(RequestFailedError, match="min_tokens|no allowed token"):
        run(llm, [PROMPT], asking(regex="ab", bad_words=["b"], temperature=0))
    assert_idle(llm)


def test_an_output_that_cannot_go_on_ends_whatever_else_is_said(llm: LLM) -> None:
    assert texts(llm, asking(regex="ab", min_tokens=20), asking(regex="abc", ignore_eos=True), asking(choice=["x"], logit_bias={EOS: -100.0}),
                 asking(choice=["xy"], allowed_token_ids=[ord("x"), ord("y")])) == ["ab", "abc", "x", "xy"]
    (long,) = run(llm, [PROMPT], asking(regex="a*", ignore_eos=True, max_tokens=9, logit_bias={EOS: 50.0}))
    assert (long.outputs[0].text, long.outputs[0].finish_reason) == ("a" * 9, "length"), "ignore_eos: as long as the grammar lets it"
    (short,) = run(llm, [PROMPT], asking(regex="a*", min_tokens=5, temperature=0, logit_bias={EOS: 50.0}))
    assert short.outputs[0].text == "aaaaa"


def test_stop_strings_stop_tokens_and_lengths_cut_as_ever(llm: LLM) -> None:
    stopped, at_token, cut = run(llm, [PROMPT] * 3, [asking(regex="abcdef", stop="cd"), asking(regex="abcdef", stop_token_ids=[ord("e")]), asking(regex="abcdef", max_tokens=3)])
    assert (stopped.outputs[0].text, stopped.outputs[0].stop_reason) == ("ab", "cd")
    assert (at_token.outputs[0].text, at_token.outputs[0].stop_reason) == ("abcd", ord("e"))
    assert (cut.outputs[0].text, cut.outputs[0].finish_reason) == ("abc", "length")


def test_a_special_stop_token_may_end_a_complete_output(llm: LLM) -> None:
    special = EOS - 1
    (output,) = run(llm, [PROMPT], asking(regex="ab", stop_token_ids=[special], logits_processors=[writes("ab", special)], temperature=0))
    assert output.outputs[0].text == "ab"


def test_processors_see_masked_logits_and_cannot_undo_them(llm: LLM) -> None:
    (text,) = texts(llm, asking(regex="[ab]{4}", logits_processors=[lambda output, logits: logits + torch.arange(len(logits))], temperature=0))
    assert text == "bbbb"


def test_preempted_outputs_go_on_where_they_were(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [asking(seed, json=PERSON, n=2) for seed in range(4)]
    with LLM(str(checkpoint), dtype="float32", max_model_len=300) as llm:
        undisturbed = [list(c.token_ids) for o in run(llm, [PROMPT] * 4, params) for c in o.outputs]
        count = 0
        schedule = Scheduler.schedule

        def disturbed(self: Scheduler):
            nonlocal count
            count += 1
            if count % 5 == 0:
                for request in list(self._running)[1:]:
                    self.preempt(request.sequence_id)
            return schedule(self)

        monkeypatch.setattr(Scheduler, "schedule", disturbed)
        outputs = run(llm, [PROMPT] * 4, params)
        assert sum(o.metrics.num_preemptions for o in outputs) > 3
        assert [list(c.token_ids) for o in outputs for c in o.outputs] == undisturbed


def test_one_bad_grammar_of_eight_costs_the_others_nothing(llm: LLM) -> None:
    good = [asking(i, regex="[a-z]{1,9}", logprobs=1) if i % 2 else SamplingParams(seed=i, max_tokens=8, ignore_eos=True) for i in range(8)]
    alone = ids(run(llm, [PROMPT] * 8, good))
    outputs = run(llm, [PROMPT] * 8, [*good[:3], asking(json={"items": {"not": {}}}), *good[4:]], on_error="return")
    assert isinstance(outputs[3].error, RequestValidationError)
    assert [list(o.outputs[0].token_ids) if o.outputs else None for o in outputs] == [*alone[:3], None, *alone[4:]]


def test_a_grammar_travels_to_workers_as_plain_data(llm: LLM) -> None:
    with recorded_steps(llm) as steps:
        texts(llm, asking(json=Person, disable_any_whitespace=True))
    (new,) = steps[0].new
    assert new.grammar == StructuredOutputsParams(json=Person, disable_any_whitespace=True).spec()
    assert [from_wire(to_wire(step)) for step in steps] == steps


def test_generate_iter_and_chat_take_grammars(llm: LLM) -> None:
    found = list(llm.generate_iter([PROMPT] * 3, [asking(i, choice=["ab", "cd"]) for i in range(3)]))
    assert {o.outputs[0].text for o in found} <= {"ab", "cd"}
    (answer,) = llm.chat([{"role": "user", "content": "?"}], asking(regex="ok"), use_tqdm=False, chat_template="{{ messages[0].content }}")
    assert answer.outputs[0].text == "ok"


def test_tokens_of_several_characters_are_cut_where_the_grammar_is(tmp_path: Path) -> None:
    with LLM(str(lively_checkpoint(tmp_path / "m", words=["ab", "bc"])), dtype="float32") as llm:
        for text in texts(llm, *(asking(seed, regex="(abc){2} ab") for seed in range(8))):
            assert text == "abcabc ab"
        assert len({tuple(i) for i in ids(run(llm, [PROMPT] * 8, [asking(seed, regex="(abc){2} ab") for seed in range(8)]))}) > 2, "however it is cut into tokens"
