"""What a grammar may cost, whatever library makes it, and that a plugin which breaks fails its own requests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from grammar_helpers import BYTES

from kvloom import LLM, SamplingParams, StructuredOutputsParams
from kvloom.errors import RequestFailedError, RequestValidationError, UnsupportedFeatureError
from kvloom.hooks.discovery import PluginSelection
from kvloom.hooks.loader import load_plugins
from kvloom.interfaces import NewSequence
from kvloom.runtime.grammar import GrammarFactory
from kvloom.structured_outputs import BackendChoice
from kvloom.text.grammar_gate import GrammarGate, find_grammar
from kvloom.text.grammar_process import attempt, load
from kvloom_plugins.grammars.guidance import Guidance

PLUGIN = '''
import time
from pydantic import BaseModel
from kvloom import hookimpl
from kvloom.errors import RequestFailedError
from kvloom.interfaces import CompiledGrammar, Grammar, GrammarMatcher, GrammarProblem
KVLOOM_API = {"grammars": 0}
class Settings(BaseModel):
    limit: int = 3
KVLOOM_CONFIG = Settings
@hookimpl
def kvloom_register_grammars(registry):
    registry.add("one-letter", "acme_0:OneLetter")
class OneLetter(Grammar):
    """A regex is a letter; up to `limit` of it are the output. Some texts make it do bad things."""
    def __init__(self, vocabulary):
        self.tokens = vocabulary.tokens
    def validate(self, spec):
        if spec.text == "sleep":
            time.sleep(60)
        if spec.text == "memory":
            self.kept = bytes(2**32)
        if spec.text == "recursion":
            self.validate(spec)
        if spec.text == "exit":
            import os
            os._exit(3)
        print("what libraries print is no answer")
        if spec.text == "print":
            raise ValueError("not like this")
        return [] if len(spec.text) == 1 else [GrammarProblem("0", "length", "one letter is wanted")]
    def compile(self, spec):
        return Compiled(self, spec.text)
class Compiled(CompiledGrammar):
    def __init__(self, owner, letter):
        self.owner, self.letter, self.size_bytes = owner, letter, 2**20
    def matcher(self):
        if self.letter == "m":
            import sys
            if "torch" in sys.modules:
                raise OSError("no matcher here")
        return Matcher(self.owner, self.letter)
class Matcher(GrammarMatcher):
    def __init__(self, owner, letter):
        self.owner, self.letter, self.made = owner, letter, 0
    def fill_masks(self, masks, draft_token_ids):
        if self.letter == "f" and self.made == 2:
            raise KeyError("lost")
        for i in range(len(masks)):
            masks[i] = -1 if self.letter == "x" else 0  # x allows what has no text, too
        if self.made < self.owner.plugin_config.limit and self.letter != "n":
            wanted = self.letter.encode()
            for i, token in enumerate(self.owner.tokens):
                if token == wanted:
                    word = masks[i // 32] & 0xFFFFFFFF | 1 << i % 32
                    masks[i // 32] = word - 2**32 if word >= 2**31 else word
    def advance(self, token_ids):
        if self.letter == "a" and self.made == 1:
            raise RuntimeError("cannot go on")
        self.made += len(token_ids)
    def rollback(self, num_tokens):
        self.made -= num_tokens
    def is_complete(self):
        return self.made > 0
    def fork(self):
        made = Matcher(self.owner, self.letter)
        made.made = self.made
        return made
'''
PROMPTS = [[i + 1, 7, 30 + i] for i in range(8)]
BAD = 3
GOOD = [SamplingParams(temperature=1.0, seed=i, max_tokens=8, ignore_eos=True, logprobs=1) for i in range(8)]


def wants(letter: str, **kwargs) -> SamplingParams:
    return SamplingParams(**{"structured_outputs": StructuredOutputsParams(regex=letter), "max_tokens": 9, "seed": 1} | kwargs)


@pytest.fixture
def llm(install, small_checkpoint: Path) -> Iterator[LLM]:
    install("acme", {"acme": PLUGIN})
    with LLM(str(small_checkpoint), dtype="float32", guided_decoding_backend="one-letter", plugin_config={"acme": {"limit": 4}}) as made:
        yield made


@pytest.fixture
def gate(install) -> Iterator[GrammarGate]:
    """Of the same plugin, with small limits."""
    install("acme", {"acme": PLUGIN})
    entry = find_grammar("one-letter", load_plugins(PluginSelection(), {"acme": {"limit": 4}}))
    made = GrammarGate(entry, BackendChoice("one-letter"), lambda: BYTES, time_limit_s=2.0, memory_limit_bytes=2**27, remembered_bytes=2000)
    yield made
    made.close()


def test_kvloom_register_grammars__a_third_partys_backend_is_chosen_by_name_and_configured(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS[:3], [wants("q", logit_bias={257: -100.0}), wants("é"), GOOD[2]], use_tqdm=False, on_error="return")
    assert outputs[0].outputs[0].text == "qqqq", "plugin_config is there, in both processes"
    assert "no token of this vocabulary" in str(outputs[1].error)
    assert len(outputs[2].outputs[0].token_ids) == 8
    with pytest.raises(RequestValidationError, match="at 0, length: one letter is wanted"):
        llm.generate(PROMPTS[0], wants("ab"), use_tqdm=False)


def test_tokens_without_text_are_not_allowed_whatever_a_plugin_says(llm: LLM) -> None:
    (output,) = llm.generate([PROMPTS[0]], wants("x", logit_bias=dict.fromkeys(range(256, 288), 50.0), max_tokens=4), use_tqdm=False)
    assert all(i < 256 for i in output.outputs[0].token_ids[:1])


@pytest.mark.parametrize(("letter", "message"), [("f", "KeyError: 'lost'"), ("a", "cannot go on"), ("m", "no matcher here"), ("n", "allows no token"),
                                                 ("sleep", "took longer than"), ("memory", "MemoryError|too much memory"), ("recursion", "RecursionError|memory or recursion"),
                                                 ("exit", "its process ended"), ("print", "ValueError: not like this")])
def test_a_plugin_that_breaks_fails_the_request_that_asked_for_it(llm: LLM, letter: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.llm_engine.rules.grammars, "_time_limit_s", 1.0)
    undisturbed = [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, GOOD, use_tqdm=False)]
    outputs = llm.generate(PROMPTS, [*GOOD[:BAD], wants(letter), *GOOD[BAD + 1:]], use_tqdm=False, on_error="return")
    assert isinstance(outputs[BAD].error, RequestFailedError | RequestValidationError)
    assert re.search(message, str(outputs[BAD].error))
    assert [list(o.outputs[0].token_ids) for i, o in enumerate(outputs) if i != BAD] == undisturbed[:BAD] + undisturbed[BAD + 1:]
    scheduler = llm.llm_engine.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.num_free_blocks == scheduler.num_usable_blocks
    (after,) = llm.generate([PROMPTS[0]], wants("q"), use_tqdm=False)
    assert set(after.outputs[0].text) == {"q"}


def test_a_grammar_that_takes_too_long_is_stopped_and_the_next_one_works(gate: GrammarGate) -> None:
    gate.admit(StructuredOutputsParams(regex="q"))
    began = time.monotonic()
    with pytest.raises(RequestValidationError, match="longer than 2 s"):
        gate.admit(StructuredOutputsParams(regex="sleep"))
    assert time.monotonic() - began < 30, "far less than it wanted"
    assert gate.admit(StructuredOutputsParams(regex="r")) == ("regex", "r", "")


def test_a_grammar_that_came_through_is_not_tried_again_while_it_is_remembered(gate: GrammarGate, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    problems = GrammarGate.problems
    monkeypatch.setattr(GrammarGate, "problems", lambda self, spec: (tried.append(spec.text), problems(self, spec))[1])
    for letter in "qqrqr":
        gate.admit(StructuredOutputsParams(regex=letter))
    assert tried == ["q", "r"]
    for i in range(50):
        gate.admit(StructuredOutputsParams(regex=chr(0x4E00 + i)))
        assert gate._passed_bytes == sum(gate._passed.values()) <= 2000
    gate.admit(StructuredOutputsParams(regex="q"))
    assert tried.count("q") == 2


def test_compiled_grammars_are_kept_under_a_bound_in_bytes() -> None:
    factory = GrammarFactory("mine", Guidance, lambda: BYTES, cache_bytes=2**20)
    compiles: list[str] = []
    library = Guidance(BYTES)

    def counting(vocabulary):
        compile_one = library.compile
        library.compile = lambda spec: (compiles.append(spec.text), compile_one(spec))[1]
        return library

    factory._make = counting
    spec = StructuredOutputsParams(json={"const": "first"}).spec()
    for i in range(400):
        factory.start(sequence(StructuredOutputsParams(json={"enum": [f"value {i}", "x" * (i % 7)]}).spec()))
        factory.start(sequence(spec))
        assert factory.cached_bytes == sum(c.size_bytes for c in factory._compiled.values()) <= 2**20
    assert compiles.count(spec.text) == 1, "the one that is used stays"
    assert len(compiles) == 401


def sequence(spec) -> NewSequence:
    return NewSequence(0, (1, 2), 2, 0, (), SamplingParams(), end_token_ids=(257,), grammar=spec)


def test_a_grammar_larger_than_the_cache_works_and_is_not_kept() -> None:
    factory = GrammarFactory("mine", Guidance, lambda: BYTES, cache_bytes=100)
    assert factory.start(sequence(StructuredOutputsParams(regex="ab").spec())) is not None
    assert (factory.cached_bytes, len(factory._compiled)) == (0, 0)


def nested_one_of(levels: int) -> dict:
    schema: dict = {"type": "object", "properties": {"a": {"type": "string"}}}
    for level in range(levels):
        schema = {"oneOf": [{"type": "object", "properties": {f"k{level}": schema, "x": {"const": 1}}}, {"type": "object", "properties": {f"k{level}": schema, "y": {"const": 2}}}]}
    return schema


HOSTILE: dict[str, Callable[[], dict]] = {
    "nested oneOf": lambda: {"json": nested_one_of(9)}, "repeats of repeats": lambda: {"regex": "((a{0,300}){0,300}){0,300}b"}, "(a|b)*a(a|b){400}": lambda: {"regex": "(a|b)*a(a|b){400}c"},
    "unicode classes": lambda: {"regex": r"(\p{L}{1,300}\p{N}{1,300}){1,300}"}, "intersections": lambda: {"json": {"allOf": [{"pattern": f"^(a|b|c)*a(a|b|c){{{i}}}$"} for i in range(10, 40)]}},
    "long choice": lambda: {"choice": [f"{i:05}" * 4 for i in range(10_000)]}, "many properties": lambda: {"json": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(4000)}}},
    "self reference": lambda: {"json": {"allOf": [{"$ref": "#"}]}}, "grammar of itself": lambda: {"grammar": "start: start start | \"a\" | "}, "bounded object": lambda: {"json": {"type": "array", "minItems": 200_000}},
    "large numbers": lambda: {"json": {"type": "integer", "multipleOf": 10**15 + 1, "minimum": 3}}, "deep groups": lambda: {"regex": "(" * 3000 + "a" + ")" * 3000},
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_grammars_end_in_time_and_the_engine_goes_on(hostile: LLM, name: str) -> None:
    began = time.monotonic()
    (output, other) = hostile.generate([PROMPTS[0]] * 2, [SamplingParams(structured_outputs=StructuredOutputsParams(**HOSTILE[name]()), max_tokens=3), GOOD[0]],
                                       use_tqdm=False, on_error="return")
    assert time.monotonic() - began < 60
    assert output.error is None or isinstance(output.error, RequestValidationError | RequestFailedError)
    assert len(other.outputs[0].token_ids) == 8
    hostile.llm_engine.engine.scheduler.check_integrity()


@pytest.fixture(scope="module")
def hostile(small_checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(small_checkpoint), dtype="float32") as made:
        yield made


def test_a_library_that_is_not_installed_says_what_to_install(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom_kernels.requirement.find_spec", lambda name: None)
    with LLM(str(small_checkpoint), dtype="float32") as llm, pytest.raises(UnsupportedFeatureError, match=r"needs the package llguidance.*kvloom\[grammars\]"):
        llm.generate(PROMPTS[0], wants("q"), use_tqdm=False)


def test_the_process_that_tries_grammars_needs_neither_torch_nor_transformers() -> None:
    asked = {"path": sys.path, "target": "kvloom_plugins.grammars.guidance:Guidance", "settings": None, "settings_model": None, "tokens": [t.hex() for t in BYTES.tokens]}
    program = (f"import json, sys\nsys.path[:] = {sys.path!r}\nfrom kvloom.text.grammar_process import load\nload(json.loads({json.dumps(asked)!r}))\n"
               "print([m for m in ('torch', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert attempt(load(asked), BYTES.size, ["regex", "a(", ""])[0][1] == "regex"
    assert attempt(load(asked), BYTES.size, ["regex", "a", ""]) == []
