"""What is thrown at an engine: a kvloom error of the named type, before anything runs, and the engine is as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvloom import LLM, SamplingParams
from kvloom.errors import RequestFailedError, RequestValidationError, shown

HUGE = 10**5000
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


class BadRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


VALUES = [HUGE, [HUGE], {"a": HUGE}, {HUGE: 1}, "deep", BadRepr(), [BadRepr()], "x" * 10**7, list(range(10**6)), {(1,): {2}}]


def deep(levels: int) -> list:
    made: list = []
    for _ in range(levels):
        made = [made]
    return made


@pytest.fixture(scope="module")
def llm(small_checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(small_checkpoint), dtype="float32") as made:
        yield made


def assert_works(llm: LLM) -> None:
    assert not llm.llm_engine.has_work
    assert len(llm.generate("ok", GREEDY, use_tqdm=False)) == 1


@pytest.mark.parametrize("which", range(len(VALUES)))
def test_every_value_can_be_shown_in_a_bounded_text(which: int) -> None:
    value = deep(10_000) if VALUES[which] == "deep" else VALUES[which]
    assert 0 < len(shown(value)) <= 203


@pytest.mark.parametrize(("name", "value"), [
    ("stop", [HUGE]), ("bad_words", [HUGE]), ("extra_args", {"x": HUGE}), ("extra_args", {"x": deep(10_000)}), ("stop_token_ids", {HUGE}),
    ("logit_bias", [HUGE]), ("output_kind", HUGE), ("stop", np.array(["a", "b"])), ("truncate_prompt_tokens", np.array([1, 2])), ("stop", 0),
    ("stop", {}), ("bad_words", ""), ("truncate_prompt_tokens", -1.0), ("n", np.int64(2)), ("stop", ["\ud800"]), ("repetition_penalty", 1e-300),
], ids=lambda v: v if isinstance(v, str) and v else type(v).__name__)
def test_strange_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestValidationError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name


@pytest.mark.parametrize(("name", "value"), [("stop", (c for c in "ab")), ("extra_args", {"x": threading.Lock()}), ("logits_processors", 5),
                                             ("output_kind", threading.Lock()), ("temperature", float("nan"))], ids=lambda v: type(v).__name__)
def test_parameters_that_were_spoiled_later_are_refused_at_admission(llm: LLM, name: str, value: object) -> None:
    params = SamplingParams(temperature=0, max_tokens=3)
    setattr(params, name, value)
    outputs = llm.generate(["a", "b"], [GREEDY, params], use_tqdm=False, on_error="return")
    assert outputs[0].error is None
    assert isinstance(outputs[1].error, RequestValidationError)
    assert outputs[1].error.parameter == name
    assert_works(llm)


@pytest.mark.parametrize("prompt", ["\ud800", {"prompt": "a\udfff"}, {"prompt": "x", "prompt_token_ids": [1], "cache_salt": ""}], ids=lambda v: type(v).__name__)
def test_texts_that_are_no_unicode_are_refused(llm: LLM, prompt: object) -> None:
    with pytest.raises(RequestValidationError):
        llm.generate(["a", prompt], GREEDY, use_tqdm=False)
    assert_works(llm)


def test_any_salt_is_just_bytes(llm: LLM) -> None:
    assert len(llm.generate({"prompt": "a", "cache_salt": "\ud800"}, GREEDY, use_tqdm=False)) == 1


def test_a_text_that_is_far_too_long_is_not_encoded(llm: LLM) -> None:
    tokenizer = llm.llm_engine.tokenizer
    lengths: list[int] = []

    def encode(text: str, **options: object) -> list[int]:
        lengths.append(len(text))
        return type(tokenizer).encode(tokenizer, text, **options)

    tokenizer.encode = encode
    try:
        with pytest.raises(RequestValidationError, match="longer than the maximum model length"):
            llm.generate("x" * 10**7, GREEDY, use_tqdm=False)
        llm.generate("x" * 10**7, SamplingParams(temperature=0, max_tokens=2, truncate_prompt_tokens=5), use_tqdm=False)
    finally:
        del tokenizer.encode
    assert max(lengths) <= 128 * 512


def test_a_validator_of_a_plugin_that_breaks_fails_its_request(install, small_checkpoint: Path) -> None:
    install("acme", {"acme": """
from pydantic import BaseModel, field_validator
from kvloom import hookimpl
from kvloom.interfaces import LogitsProcessor
KVLOOM_API = {"logits_processors": 0}
@hookimpl
def kvloom_register_logits_processors(registry):
    registry.add("mine", "acme_0:Mine", config=Settings)
class Settings(BaseModel):
    a: int
    @field_validator("a")
    @classmethod
    def breaks(cls, value):
        raise RuntimeError("in the validator")
class Mine(LogitsProcessor):
    def new_state(self, parameters, sequence):
        return parameters
    def apply(self, logits, states):
        return logits
"""})
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        bad = SamplingParams(max_tokens=2, extra_args={"mine": {"a": 1}})
        outputs = llm.generate(["a", "b"], [GREEDY, bad], use_tqdm=False, on_error="return")
        assert outputs[0].error is None
        assert isinstance(outputs[1].error, RequestFailedError)
        assert "'mine' (plugin 'acme' of acme 1.0) raised RuntimeError: in the validator" in str(outputs[1].error)


def test_deltas_that_were_taken_over_in_part_are_taken_over_in_whole_by_the_repeat(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(["a", "b", "c"], GREEDY, use_tqdm=False)]
        (state,) = llm.llm_engine.executor.call(lambda worker: worker._runner._state)
        original, calls = state._add, []

        def add(new: object) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise MemoryError("once")
            original(new)

        state._add = add
        assert [o.outputs[0].token_ids for o in llm.generate(["a", "b", "c"], GREEDY, use_tqdm=False)] == expected
