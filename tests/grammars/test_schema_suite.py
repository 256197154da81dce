"""The JSON-Schema-Test-Suite: what is taken is enforced, what is not is named, and outputs of small models are valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from grammar_helpers import BYTES
from test_guidance import accepts

from kvloom import LLM, SamplingParams, StructuredOutputsParams
from kvloom.demo import model_dir
from kvloom.interfaces import GrammarSpec
from kvloom_plugins.grammars.guidance import Guidance

jsonschema = pytest.importorskip("jsonschema")
MIN_TAKEN = 170
"""Of 383; see docs/structured_output.md."""


@pytest.fixture(scope="module")
def suite(shared_dir: Path) -> list[tuple[str, object, list]]:
    folder = shared_dir / "data/json-schema-test-suite/tests/draft2020-12"
    return [(f"{file.stem}: {group['description']}", group["schema"], group["tests"])
            for file in sorted(folder.glob("*.json")) for group in json.loads(file.read_text())]


@pytest.fixture(scope="module")
def guidance() -> Guidance:
    return Guidance(BYTES)


def spec(schema: object) -> GrammarSpec:
    return GrammarSpec("json", json.dumps(schema))


def test_no_schema_that_is_taken_lets_an_invalid_instance_through(suite: list, guidance: Guidance) -> None:
    taken, wrong = 0, []
    for name, schema, tests in suite:
        if guidance.validate(spec(schema)):
            continue
        taken += 1
        wrong += [f"{name}: {test['description']}" for test in tests
                  if not test["valid"] and accepts(guidance, spec(schema), json.dumps(test["data"], separators=(",", ":"), ensure_ascii=False))]
    assert taken >= MIN_TAKEN
    assert wrong == []


def test_every_schema_that_is_not_taken_says_where_and_which_keyword(suite: list, guidance: Guidance) -> None:
    vague = []
    for name, schema, _ in suite:
        for where, keyword, reason in guidance.validate(spec(schema)):
            here = schema
            for part in where.split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                here = here[int(part)] if isinstance(here, list) else here[part]
            assert keyword == "schema" or keyword in here, (name, where, keyword)
            assert reason
            vague += [name] if keyword == "schema" else []
    assert len(vague) <= 10, vague


def test_outputs_of_the_demo_model_end_and_are_valid(suite: list) -> None:
    with LLM(str(model_dir()), dtype="float32", max_model_len=300) as llm:
        some = [(name, schema) for name, schema, _ in suite if not llm.validate_grammar(StructuredOutputsParams(json=schema))][::6]
        params = [SamplingParams(seed=0, max_tokens=256, structured_outputs=StructuredOutputsParams(json=schema, disable_any_whitespace=True)) for _, schema in some]
        outputs = llm.generate(["Once upon a time"] * len(some), params, use_tqdm=False)
    ended = [(name, schema, o.outputs[0].text) for (name, schema), o in zip(some, outputs, strict=True) if o.outputs[0].finish_reason == "stop"]
    assert len(ended) >= 0.8 * len(some)
    for name, schema, text in ended:
        assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)), (name, text)
