"""`SamplingParams`, end to end: functions and named plugins that change logits, and how the object is made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from api_helpers import Truth, assert_idle, ids, recorded_steps, run, writes

from kvloom import LLM, SamplingParams
from kvloom.errors import RequestFailedError, RequestValidationError
from kvloom.params import field_names
from kvloom.testing.checkpoints import VOCAB_SIZE

PROMPT = [5, 6, 7, 7, 100, 3]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32") as made:
        yield made


def greedy(**params) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, "ignore_eos": True} | params)


def test_every_field_has_a_test_by_its_name() -> None:
    names = set(re.findall(r"def test_(\w+?)__", "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))))
    assert {*field_names(), "output_text_buffer_length"} <= names


# -- how the object is made

def test_sampling_params__positional_arguments_come_in_the_order_of_the_fields() -> None:
    params = SamplingParams(2, 3, 0.1, 0.2, 1.1, 0.9, 0.8, 7, 0.05, 11)
    assert params == SamplingParams(n=2, best_of=3, presence_penalty=0.1, frequency_penalty=0.2, repetition_penalty=1.1, temperature=0.9, top_p=0.8,
                                    top_k=7, min_p=0.05, seed=11)


def test_sampling_params__an_unknown_name_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)


def test_sampling_params__from_optional_takes_none_for_the_default() -> None:
    names = [f.name for f in fields(SamplingParams) if f.name != "max_tokens"]
    assert SamplingParams.from_optional(**dict.fromkeys(names)) == SamplingParams()
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None
    assert SamplingParams.from_optional(temperature=None, top_k=5, stop=["x"]) == SamplingParams(top_k=5, stop=["x"])


def test_sampling_params__clone_is_deep_and_shares_only_functions() -> None:
    params = SamplingParams(stop=["a"], logit_bias={1: 1.0}, extra_args={"x": {"y": [1]}}, logits_processors=[writes("x")], bad_words=["b"])
    copy = params.clone()
    assert copy == params
    copy.stop.append("b")
    copy.logit_bias[2] = 2.0
    copy.extra_args["x"]["y"].append(2)
    copy.bad_words.append("c")
    copy.logits_processors.append(print)
    assert (params.stop, params.logit_bias, params.extra_args, params.bad_words) == (["a"], {1: 1.0}, {"x": {"y": [1]}}, ["b"])
    assert copy.logits_processors[0] is params.logits_processors[0]


# -- logits_processors

class Calls:
    """A function that remembers what it is called with; an object with a state, as callers may have."""

    def __init__(self) -> None:
        self.arguments: list[tuple] = []


class OutputOnly(Calls):
    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        self.arguments.append((list(output_ids), logits.clone()))
        return logits


class PromptToo(Calls):
    def __call__(self, prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        self.arguments.append((list(prompt_ids), list(output_ids), logits.clone()))
        return logits


def test_logits_processors__with_two_arguments_get_the_output_and_float32_logits(llm: LLM, truth: Truth) -> None:
    function = OutputOnly()
    (output,) = run(llm, [PROMPT], greedy(logits_processors=[function]))
    tokens = list(output.outputs[0].token_ids)
    assert [o for o, _ in function.arguments] == [tokens[:i] for i in range(6)]
    for i, (_, logits) in enumerate(function.arguments):
        assert (logits.shape, logits.dtype) == ((VOCAB_SIZE,), torch.float32)
        torch.testing.assert_close(logits, truth.after(PROMPT + tokens[:i]), atol=1e-4, rtol=1e-4)


def test_logits_processors__with_three_arguments_get_the_prompt_too(llm: LLM) -> None:
    function = PromptToo()
    (output,) = run(llm, [PROMPT], greedy(logits_processors=[function]))
    tokens = list(output.outputs[0].token_ids)
    assert [(p, o) for p, o, _ in function.arguments] == [(PROMPT, tokens[:i]) for i in range(6)]


def test_logits_processors__run_in_their_order_on_what_the_one_before_gave(llm: LLM) -> None:
    def first(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits).index_fill(0, torch.tensor([10, 11]), 2.0)

    def second(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[11] *= 2 if len(output_ids) % 2 else 0.5
        return logits

    assert ids(run(llm, [PROMPT], greedy(logits_processors=[first, second]))) == [[10, 11, 10, 11, 10, 11]]


def test_logits_processors__cannot_change_the_ids_they_are_given(llm: LLM) -> None:
    def spoils(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        prompt_ids.clear()
        output_ids.append(1)
        return logits

    assert ids(run(llm, [PROMPT], greedy(logits_processors=[spoils]))) == ids(run(llm, [PROMPT], GREEDY))


def test_logits_processors__samples_are_told_their_own_output(llm: LLM) -> None:
    function = OutputOnly()
    (output,) = run(llm, [PROMPT], SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True, logits_processors=[function]))
    seen = {tuple(o) for o, _ in function.arguments}
    assert seen == {tuple(o.token_ids[:i]) for o in output.outputs for i in range(4)}


def test_logits_processors__touch_no_other_row(llm: LLM) -> None:
    prompts = [PROMPT, [1, 2], [3] * 20]
    expected = ids(run(llm, prompts, GREEDY))
    found = ids(run(llm, prompts, [GREEDY, greedy(logits_processors=[writes("abcdef")]), GREEDY]))
    assert found == [expected[0], list(b"abcdef"), expected[2]]


def raises_at_three(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    if len(output_ids) == 3:
        raise ZeroDivisionError("three is too many")
    return logits


def gives_five(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits[:5]


def gives_nothing(output_ids: list[int], logits: torch.Tensor) -> None:
    logits += 1


def gives_nan(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits * float("nan")


def allows_nothing(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return torch.full_like(logits, -torch.inf)


WHO = r"logits processor 'functions' \(plugin 'kvloom-samplers' of kvloom"
FAILURES = [
    (raises_at_three, rf"{WHO}.*raises_at_three raised ZeroDivisionError: three is too many"), (gives_five, rf"{WHO}.*gives_five gave \(5,\)"),
    (gives_nothing, rf"{WHO}.*gives_nothing gave NoneType"), (gives_nan, rf"{WHO}.*gives_nan left NaN"), (allows_nothing, rf"{WHO}.*no allowed token"),
]


@pytest.mark.parametrize(("function", "message"), FAILURES, ids=lambda v: getattr(v, "__name__", ""))
def test_logits_processors__one_that_fails_is_named_with_its_processor_and_plugin(llm: LLM, function, message: str) -> None:
    with pytest.raises(RequestFailedError, match=message):
        llm.generate([PROMPT], greedy(logits_processors=[function]), use_tqdm=False)
    assert_idle(llm)


@pytest.mark.parametrize(("function", "message"), FAILURES, ids=lambda v: getattr(v, "__name__", ""))
def test_logits_processors__one_that_fails_ends_only_its_request(llm: LLM, function, message: str) -> None:
    prompts = [PROMPT, [1, 2], [3] * 20]
    params = SamplingParams(seed=3, max_tokens=6, ignore_eos=True)
    expected = ids(run(llm, prompts, params))
    outputs = run(llm, prompts, [params, greedy(logits_processors=[function]), params], on_error="return")
    assert isinstance(outputs[1].error, RequestFailedError)
    assert re.search(message, str(outputs[1].error))
    assert ids([outputs[0], outputs[2]]) == [expected[0], expected[2]]
    assert len(outputs[1].outputs[0].token_ids) == (3 if function is raises_at_three else 0)


def test_logits_processors__a_failure_has_the_functions_own_exception_as_its_cause(llm: LLM) -> None:
    with pytest.raises(RequestFailedError) as caught:
        llm.generate([PROMPT], greedy(logits_processors=[raises_at_three]), use_tqdm=False)
    causes, error = [], caught.value
    while error is not None:
        causes.append(type(error))
        error = error.__cause__
    assert causes[-1] is ZeroDivisionError


@pytest.mark.parametrize("function", [lambda: None, lambda a: None, lambda a, b, c, d: None, lambda *, a, b: None])
def test_logits_processors__one_that_takes_something_else_is_refused(llm: LLM, function) -> None:
    with recorded_steps(llm) as steps, pytest.raises(RequestValidationError, match=r"must take \(output_ids, logits\) or") as caught:
        llm.generate([PROMPT, [1]], [GREEDY, greedy(logits_processors=[function])], use_tqdm=False)
    assert (caught.value.parameter, steps) == ("logits_processors", [])
    assert_idle(llm)


def test_logits_processors__see_what_they_saw_again_after_a_preemption(checkpoint: Path) -> None:
    params = [SamplingParams(seed=i, max_tokens=30, ignore_eos=True, logits_processors=[halves_repeats]) for i in range(4)]
    prompts = [[i] * 30 for i in range(4)]
    with LLM(str(checkpoint), dtype="float32") as roomy, LLM(str(checkpoint), dtype="float32", num_gpu_blocks_override=10) as tight:
        expected, found = run(roomy, prompts, params), run(tight, prompts, params)
    assert sum(o.metrics.num_preemptions for o in found) > 0
    assert ids(found) == ids(expected)


def halves_repeats(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[sorted({*prompt_ids, *output_ids})] /= 2
    return logits


# -- extra_args: processors that a plugin registers under a name, with a model of their parameters

STRANGER = """
import torch
from pydantic import BaseModel, ConfigDict
from kvloom import hookimpl
from kvloom.errors import RequestValidationError
from kvloom.interfaces import LogitsProcessor
KVLOOM_API = {"logits_processors": 0}

class Steps(BaseModel):
    model_config = ConfigDict(extra="forbid")
    first: int
    by: int = 1

@hookimpl
def kvloom_register_logits_processors(registry):
    registry.add("counting", "acme_0:Counting", config=Steps)
    registry.add("upwards", "acme_0:Upwards", config="acme_0:Steps")

class Counting(LogitsProcessor):
    '''Sample i begins at first + 100 * i and counts on.'''
    def new_state(self, parameters, sequence):
        if parameters.first >= sequence.vocab_size:
            raise RequestValidationError("first is out of vocabulary", "extra_args", parameters.first)
        return [parameters.first + 100 * sequence.sample_index, parameters.by]
    def apply(self, logits, states):
        for row, (now, _) in zip(logits, states, strict=True):
            row[now] += 1e4
        return logits
    def advance(self, state, token_ids):
        state[0] += state[1] * len(token_ids)

class Upwards(LogitsProcessor):
    def new_state(self, parameters, sequence):
        return parameters.first
    def apply(self, logits, states):
        if 13 in states:
            raise OverflowError("thirteen")
        return logits
"""


@pytest.fixture
def counting(install, checkpoint: Path) -> Iterator[LLM]:
    install("acme", {"acme-counts": STRANGER})
    with LLM(str(checkpoint), dtype="float32") as made:
        yield made


def counts(first: int, by: int = 1, **params) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 4, "ignore_eos": True, "extra_args": {"counting": {"first": first, "by": by}}} | params)


def test_extra_args__two_requests_of_a_batch_have_their_own_parameters_and_a_third_none(counting: LLM) -> None:
    expected = ids(run(counting, [PROMPT], GREEDY))[0]
    found = ids(run(counting, [PROMPT] * 3, [counts(10), GREEDY, counts(50, 5)]))
    assert found == [[10, 11, 12, 13], expected, [50, 55, 60, 65]]


def test_extra_args__each_sample_has_a_state_of_its_own(counting: LLM) -> None:
    (output,) = run(counting, [PROMPT], counts(10, 2, n=3))
    assert [list(o.token_ids) for o in output.outputs] == [[10, 12, 14, 16], [110, 112, 114, 116], [210, 212, 214, 216]]


def test_extra_args__defaults_of_the_plugins_model_hold(counting: LLM) -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True, extra_args={"counting": {"first": 7}})
    assert ids(run(counting, [PROMPT], params)) == [[7, 8, 9]]


def test_extra_args__the_state_is_where_it_was_after_a_preemption(install, checkpoint: Path) -> None:
    install("acme", {"acme-counts": STRANGER})
    with LLM(str(checkpoint), dtype="float32", num_gpu_blocks_override=10) as tight:
        outputs = run(tight, [[i] * 30 for i in range(4)], [counts(i, max_tokens=30) for i in range(4)])
    assert sum(o.metrics.num_preemptions for o in outputs) > 0
    assert ids(outputs) == [list(range(i, i + 30)) for i in range(4)]


@pytest.mark.parametrize(("given", "message"), [
    ({"countin": {"first": 1}}, r"'countin'.*did you mean 'counting'.*there are: counting, upwards"),
    ({"counting": {"first": 1, "step": 2}}, r"extra_args\['counting'\]: step: .*its parameters: first, by"),
    ({"counting": {"first": "one"}}, r"extra_args\['counting'\]: first: .*its parameters: first, by"),
    ({"counting": {}}, r"first: Field required.*its parameters: first, by"), ({"counting": 5}, r"extra_args\['counting'\].*first, by"),
    ({"counting": None}, r"extra_args\['counting'\].*first, by"), ({"counting": {"first": 10**6}}, "first is out of vocabulary"),
    ({"penalties": {}}, r"'penalties'.*there are: counting, upwards"), ({"counting": {"first": 1}, "x": {}}, "'x'.*there are: counting, upwards"),
])
def test_extra_args__unknown_names_and_wrong_parameters_are_refused_with_what_there_is(counting: LLM, given: dict, message: str) -> None:
    with recorded_steps(counting) as steps, pytest.raises(RequestValidationError, match=message) as caught:
        counting.generate(["fine", PROMPT], [GREEDY, SamplingParams(extra_args=given)], use_tqdm=False)
    assert (caught.value.parameter, steps) == ("extra_args", [])
    assert_idle(counting)
    assert ids(run(counting, [PROMPT], counts(1))) == [[1, 2, 3, 4]]


def test_extra_args__without_a_plugin_there_is_nothing_to_name(llm: LLM) -> None:
    with pytest.raises(RequestValidationError, match=r"'anything'.*there are: none"):
        llm.generate([PROMPT], SamplingParams(extra_args={"anything": {}}), use_tqdm=False)
    assert len(run(llm, [PROMPT], SamplingParams(extra_args={}))) == 1


def test_extra_args__a_processor_that_raises_is_named_and_its_neighbours_go_on(counting: LLM) -> None:
    expected = ids(run(counting, [PROMPT], GREEDY))[0]
    params = [GREEDY, SamplingParams(extra_args={"upwards": {"first": 13}}), counts(10)]
    outputs = run(counting, [PROMPT] * 3, params, on_error="return")
    assert ids([outputs[0], outputs[2]]) == [expected, [10, 11, 12, 13]]
    assert re.search(r"logits processor 'upwards' \(plugin 'acme-counts' of acme 1\.0\) raised OverflowError: thirteen", str(outputs[1].error))


def test_extra_args__the_callers_dictionary_is_not_changed(counting: LLM) -> None:
    given = {"counting": {"first": 10}}
    params = SamplingParams(max_tokens=2, extra_args=given)
    run(counting, [PROMPT] * 2, params)
    assert params.extra_args is given
    assert given == {"counting": {"first": 10}}
