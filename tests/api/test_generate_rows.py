"""`LLM.generate` and `LLM.generate_iter`: their arguments, their order, and what they leave behind."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from api_helpers import Truth, assert_idle, ids, lively_checkpoint, recorded_steps, run, writes

from kvloom import LLM, SamplingParams
from kvloom.errors import EngineClosedError, RequestFailedError, RequestTypeError, RequestValidationError, UnsupportedFeatureError
from kvloom.testing.checkpoints import BOS

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32", max_model_len=100) as made:
        yield made


def length(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def fails_at(count: int):
    """A function that raises once there are so many tokens."""

    def fail(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output_ids) == count:
            raise ArithmeticError("made to fail")
        return logits

    return fail


def refused(llm: LLM, error: type[Exception], message: str, *args, **kwargs):
    """Nothing is computed, and nothing stays."""
    with recorded_steps(llm) as steps, pytest.raises(error, match=message) as caught:
        llm.generate(*args, **{"use_tqdm": False} | kwargs)
    assert steps == []
    assert_idle(llm)
    return caught.value


# -- prompts, and the ways of older versions to give them

def test_generate__signature_has_vllms_names_in_vllms_order() -> None:
    names = list(inspect.signature(LLM.generate).parameters)
    assert names[1:9] == ["prompts", "sampling_params", "prompt_token_ids", "use_tqdm", "lora_request", "prompt_adapter_request",
                          "guided_options_request", "priority"]


def test_generate__prompts_may_go_by_keyword_and_sampling_params_by_position(llm: LLM) -> None:
    by_keyword = llm.generate(prompts=["a"], sampling_params=GREEDY, use_tqdm=False)
    assert ids(by_keyword) == ids(llm.generate(["a"], GREEDY, use_tqdm=False))


def test_generate__neither_prompts_nor_ids_is_a_value_error(llm: LLM) -> None:
    assert isinstance(refused(llm, RequestValidationError, "Either prompts or prompt_token_ids must be provided"), ValueError)


def test_generate__none_is_a_type_error(llm: LLM) -> None:
    assert isinstance(refused(llm, RequestTypeError, "prompts must be", None), TypeError)


LEGACY = [
    (("ab", GREEDY), {"prompt_token_ids": [1, 2]}, ["ab"]), ((["a", "b"], GREEDY), {"prompt_token_ids": [[1], [2, 3]]}, ["a", "b"]),
    ((), {"prompt_token_ids": [1, 2], "sampling_params": GREEDY}, [[1, 2]]), ((), {"prompt_token_ids": [[1, 2], [3]], "sampling_params": GREEDY}, [[1, 2], [3]]),
    ((None, GREEDY, [4, 5]), {}, [[4, 5]]), ((None, GREEDY, [[4], [5, 6]]), {}, [[4], [5, 6]]), ((), {"prompts": "ab", "prompt_token_ids": [[1]], "sampling_params": GREEDY}, ["ab"]),
]


@pytest.mark.parametrize(("args", "kwargs", "same_as"), LEGACY, ids=range(len(LEGACY)))
def test_generate__prompt_token_ids_of_older_versions_still_work_with_a_warning(llm: LLM, args, kwargs, same_as) -> None:
    with pytest.warns(DeprecationWarning, match="prompt_token_ids is deprecated") as caught:
        found = llm.generate(*args, use_tqdm=False, **kwargs)
    assert [w.filename for w in caught] == [__file__]
    expected = run(llm, same_as, GREEDY)
    assert [(o.prompt, o.prompt_token_ids) for o in found] == [(o.prompt, o.prompt_token_ids) for o in expected]
    assert ids(found) == ids(expected)


@pytest.mark.parametrize(("args", "kwargs", "same_as"), LEGACY, ids=range(len(LEGACY)))
def test_generate__prompt_token_ids_do_not_warn_where_deprecate_legacy_is_off(llm: LLM, monkeypatch, args, kwargs, same_as) -> None:
    monkeypatch.setattr(LLM, "DEPRECATE_LEGACY", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(llm.generate(*args, use_tqdm=False, **kwargs)) == ids(run(llm, same_as, GREEDY))


@pytest.mark.parametrize(("args", "ids_given", "error", "message"), [
    (("a",), [[1], [2]], ValueError, "The lengths of prompts and prompt_token_ids must be the same"),
    ((["a", "b"],), [1, 2], ValueError, "The lengths of prompts and prompt_token_ids must be the same"), ((), [], ValueError, "please provide at least one prompt"),
    ((), [[]], ValueError, "please provide at least one prompt"), ((None,), [], ValueError, "please provide at least one prompt"),
    ((), [1, [2]], TypeError, "prompt must be a string, array of strings, array of tokens, or array of token arrays"),
    ((), [1, "a"], TypeError, "prompt must be a string"), ((), "ab", TypeError, "prompt must be a string"), ((), 5, TypeError, "prompt must be a string"),
    ((), [[1], []], ValueError, "cannot be empty"), ((), [10**6], ValueError, "out of vocabulary"),
])
def test_generate__prompt_token_ids_that_make_no_sense_are_refused(llm: LLM, monkeypatch, args, ids_given, error, message: str) -> None:
    monkeypatch.setattr(LLM, "DEPRECATE_LEGACY", False)
    refused(llm, error, message, *args, prompt_token_ids=ids_given)


# -- sampling_params

def test_generate__without_params_generation_config_is_on_top_of_the_defaults(tmp_path: Path) -> None:
    values = {"temperature": 0.6, "top_k": 9, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.3, "max_new_tokens": 3, "do_sample": True}
    directory = lively_checkpoint(tmp_path / "m", values)
    expected = SamplingParams(temperature=0.6, top_k=9, top_p=0.8, min_p=0.01, repetition_penalty=1.3, max_tokens=3)
    with LLM(str(directory), dtype="float32", seed=4) as llm:
        assert llm.get_default_sampling_params() == expected
        (by_default,) = llm.generate(["a"], use_tqdm=False)
    with LLM(str(directory), dtype="float32", seed=4) as llm:
        (by_hand,) = run(llm, ["a"], expected)
    assert by_default.outputs[0].token_ids == by_hand.outputs[0].token_ids
    assert 1 <= len(by_default.outputs[0].token_ids) <= 3


def test_generate__default_params_are_a_new_object_each_time(llm: LLM) -> None:
    first = llm.get_default_sampling_params()
    assert first == SamplingParams()
    first.temperature, first.max_tokens = 0.0, 1
    assert llm.get_default_sampling_params() == SamplingParams()
    (output,) = llm.generate([[1, 2]], use_tqdm=False)
    assert len(output.outputs[0].token_ids) > 1


@pytest.mark.parametrize("kind", [list, tuple])
def test_generate__params_one_a_prompt(llm: LLM, kind) -> None:
    outputs = run(llm, ["a", "b", "c"], kind(length(n) for n in (3, 1, 2)))
    assert [len(t) for t in ids(outputs)] == [3, 1, 2]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("kind", [list, tuple])
def test_generate__params_of_another_number_are_refused(llm: LLM, kind, count: int) -> None:
    error = refused(llm, RequestValidationError, "The lengths of prompts and params must be the same", ["a", "b"], kind([GREEDY] * count))
    assert (error.parameter, error.value) == ("sampling_params", count)


@pytest.mark.parametrize("given", [{"temperature": 0}, 5, [GREEDY, None], [GREEDY, {"n": 1}], "ab"], ids=repr)
def test_generate__params_of_another_type_are_refused(llm: LLM, given) -> None:
    assert refused(llm, RequestTypeError, "sampling_params must be SamplingParams", ["a", "b"], given).parameter == "sampling_params"


def test_generate__the_callers_params_are_not_changed_and_their_functions_are_called(llm: LLM) -> None:
    function = writes("xyz")
    given = [SamplingParams(n=2, logprobs=-1, seed=-1, stop="q", max_tokens=3, logit_bias={1: 1.0}, stop_token_ids=[2], logits_processors=[function])]
    given[0].logprobs = True
    before, lists = given[0].clone(), (given[0].logits_processors, given[0].stop_token_ids, given[0].logit_bias)
    (output,) = run(llm, ["a"], given)
    assert [o.text for o in output.outputs] == ["xyz", "xyz"]
    assert given[0] == before
    assert given[0].logprobs is True
    assert all(mine is still for mine, still in zip(lists, (given[0].logits_processors, given[0].stop_token_ids, given[0].logit_bias), strict=True))


def test_generate__params_changed_afterwards_do_not_matter(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logit_bias={7: 100.0})
    iterator = llm.generate_iter([[1], [2]], params, max_in_flight=2)
    first = next(iterator)
    params.logit_bias[8], params.max_tokens = 1000.0, 1
    assert ids([first, *iterator]) == [[7] * 5] * 2


def test_generate__params_that_became_wrong_are_checked_again(llm: LLM) -> None:
    params = SamplingParams()
    params.top_p = 0.0
    assert refused(llm, RequestValidationError, "top_p", ["a", "b"], [SamplingParams(), params]).parameter == "top_p"


# -- the other arguments

@pytest.mark.parametrize("name", ["lora_request", "prompt_adapter_request"])
def test_generate__arguments_of_later_features_are_refused_by_name(llm: LLM, name: str) -> None:
    assert isinstance(refused(llm, UnsupportedFeatureError, name, "a", GREEDY, **{name: object()}), ValueError)


@pytest.mark.parametrize("given", [None, 0, 3, -5, [1, 2, 3], (3, -1, 2)], ids=repr)
def test_generate__priority_is_taken_and_ignored_where_first_come_is_first_served(llm: LLM, given) -> None:
    outputs = run(llm, ["a", "b", "c"], GREEDY, priority=given)
    assert ids(outputs) == ids(run(llm, ["a", "b", "c"], GREEDY))


def test_generate__lower_priorities_are_served_earlier(checkpoint: Path) -> None:
    with LLM(str(checkpoint), dtype="float32", scheduling_policy="priority", max_num_seqs=1) as llm:
        outputs = run(llm, ["a", "b", "c", "d"], GREEDY, priority=[5, -3, 2, -3])
        assert [o.prompt for o in outputs] == ["a", "b", "c", "d"]
        assert [o.prompt for o in sorted(outputs, key=lambda o: o.metrics.first_token_time)] == ["b", "d", "c", "a"]
        same = run(llm, ["a", "b"], GREEDY, priority=7)
        assert same[0].metrics.first_token_time < same[1].metrics.first_token_time


@pytest.mark.parametrize(("given", "error"), [([], ValueError), ([1], ValueError), ([1, 2, 3], ValueError), ([1, True], ValueError), ([1, 1.5], ValueError),
                                              (1.5, TypeError), (True, ValueError), ("ab", ValueError), ([1, 2**40], ValueError)], ids=repr)
def test_generate__priorities_that_do_not_fit_are_refused(llm: LLM, given, error) -> None:
    assert refused(llm, error, "priority", ["a", "b"], GREEDY, priority=given).parameter == "priority"


def test_generate__use_tqdm_shows_a_bar_on_standard_error_or_nothing(llm: LLM, capsys) -> None:
    llm.generate(["a", "b"], GREEDY)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Processed prompts: 100%" in err
    assert "2/2" in err
    assert "toks/s" in err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr() == ("", "")


class Bar:
    """What `use_tqdm` may make instead of tqdm."""

    def __init__(self, **kwargs) -> None:
        self.kwargs, self.done, self.closed, self.postfix = kwargs, 0, 0, ""

    def update(self, count: int) -> None:
        self.done += count

    def close(self) -> None:
        self.closed += 1


def test_generate__use_tqdm_may_be_a_function_that_makes_the_bar(llm: LLM) -> None:
    bars: list[Bar] = []

    def make(**kwargs) -> Bar:
        bars.append(Bar(**kwargs))
        return bars[-1]

    run_with = {"sampling_params": GREEDY, "use_tqdm": make}
    assert len(llm.generate(["a", "b", "c"], **run_with)) == 3
    (bar,) = bars
    assert (bar.kwargs["total"], bar.kwargs["desc"], bar.done, bar.closed) == (3, "Processed prompts", 3, 1)
    assert "toks/s" in bar.postfix
    with pytest.raises(RequestFailedError):
        llm.generate(["a"], SamplingParams(logits_processors=[fails_at(0)]), use_tqdm=make)
    assert (bars[1].done, bars[1].closed) == (0, 1)
    assert_idle(llm)


def test_generate__results_come_in_the_order_of_the_prompts_and_ids_count_up(checkpoint: Path) -> None:
    with LLM(str(checkpoint), dtype="float32", max_num_seqs=2) as llm:
        outputs = run(llm, [[i] for i in range(6)], [length(n) for n in (9, 1, 5, 2, 7, 3)])
        assert [o.prompt_token_ids for o in outputs] == [[i] for i in range(6)]
        with pytest.raises(RequestValidationError):
            llm.generate([[1], [10**6]], GREEDY, use_tqdm=False)
        outputs += run(llm, "x", GREEDY)
    assert [o.request_id for o in outputs] == [str(i) for i in range(7)]


def test_generate__many_prompts_give_what_each_gives_alone(llm: LLM, truth: Truth) -> None:
    prompts = [[(3 * i + j) % 250 for j in range(1 + 5 * i)] for i in range(12)]
    assert ids(run(llm, prompts, GREEDY)) == [truth.greedy(p, 5) for p in prompts]


def test_generate__n_samples_have_indices_in_order(llm: LLM) -> None:
    outputs = run(llm, ["a", "b"], [SamplingParams(n=3, seed=1, max_tokens=4), SamplingParams(n=2, seed=1, max_tokens=4)])
    assert [[o.index for o in output.outputs] for output in outputs] == [[0, 1, 2], [0, 1]]


# -- errors

@pytest.mark.parametrize("given", ["ignore", None, True])
def test_generate__on_error_is_raise_or_return(llm: LLM, given) -> None:
    assert refused(llm, RequestValidationError, "on_error must be 'raise' or 'return'", "a", GREEDY, on_error=given).parameter == "on_error"


def test_generate__on_error_return_puts_errors_in_their_places_and_neighbours_are_unchanged(llm: LLM, truth: Truth) -> None:
    seeded = SamplingParams(seed=5, max_tokens=6, ignore_eos=True)
    expected = ids(run(llm, ["a", "b", "c"], seeded))
    prompts = ["a", [10**6], "b", {"bad": 1}, "x", None, [1] * 100, "c", {"prompt": "m", "multi_modal_data": {"x": 1}}]
    params = [seeded] * len(prompts)
    params[4] = SamplingParams(max_tokens=6, ignore_eos=True, logits_processors=[fails_at(2)])
    outputs = run(llm, prompts, params, on_error="return")
    kinds = [None if o.error is None else type(o.error) for o in outputs]
    assert kinds == [None, RequestValidationError, None, RequestTypeError, RequestFailedError, RequestTypeError, RequestValidationError, None, UnsupportedFeatureError]
    assert ids([outputs[0], outputs[2], outputs[7]]) == expected
    assert [len(o.outputs) for o in outputs] == [1, 0, 1, 0, 1, 0, 0, 1, 0]
    assert len(outputs[4].outputs[0].token_ids) == 2
    first = int(outputs[0].request_id)
    assert [int(o.request_id) for o in outputs] == list(range(first, first + 9))
    assert int(run(llm, "x", GREEDY)[0].request_id) == first + 9


def test_generate__on_error_return_takes_bad_params_of_one_prompt_too(llm: LLM) -> None:
    bad = SamplingParams()
    bad.temperature = -1.0
    good, refused_one = run(llm, ["a", "b"], [GREEDY, bad], on_error="return")
    assert good.error is None
    assert refused_one.error.parameter == "temperature"


def test_generate__on_error_return_of_only_refused_prompts(llm: LLM) -> None:
    with recorded_steps(llm) as steps:
        outputs = run(llm, [[10**6], [-1]], GREEDY, on_error="return")
    assert [type(o.error) for o in outputs] == [RequestValidationError] * 2
    assert steps == []


def test_generate__a_request_that_fails_raises_and_leaves_nothing(llm: LLM) -> None:
    params = [length(20), SamplingParams(temperature=0, logits_processors=[fails_at(2)]), length(20)]
    with pytest.raises(RequestFailedError, match="made to fail"):
        llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert_idle(llm)
    assert [o.prompt for o in run(llm, ["good"], GREEDY)] == ["good"]


def test_generate__one_sample_that_fails_fails_its_request(llm: LLM) -> None:
    def fails_for_one(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if output_ids[:1] == [1]:
            raise ArithmeticError("made to fail")
        out = torch.full_like(logits, -torch.inf)
        out[:2] = 0.0
        return out

    other, output = run(llm, ["a", "b"], [GREEDY, SamplingParams(n=8, seed=1, max_tokens=5, logits_processors=[fails_for_one])], on_error="return")
    assert other.error is None
    assert isinstance(output.error, RequestFailedError)
    assert len(output.outputs) == 8
    assert "error" in {o.finish_reason for o in output.outputs}


# -- generate_iter

class Source:
    """Prompts that say how many were read."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, 0

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(self.count):
            self.read += 1
            yield [i % 250, 7]


def test_generate_iter__gives_what_generate_gives_with_ids_in_the_order_of_reading(checkpoint: Path, llm: LLM) -> None:
    params = [length(1 + i % 4) for i in range(20)]
    expected = ids(run(llm, list(Source(20)), params))
    with LLM(str(checkpoint), dtype="float32", max_num_seqs=3) as narrow:
        outputs = sorted(narrow.generate_iter(Source(20), params), key=lambda o: int(o.request_id))
        assert_idle(narrow)
    assert [o.request_id for o in outputs] == [str(i) for i in range(20)]
    assert ids(outputs) == expected
    assert all(o.finished for o in outputs)


def test_generate_iter__reads_as_there_is_room_and_yields_before_the_source_ends(llm: LLM) -> None:
    source = Source(10**9)
    with closing(llm.generate_iter(source, GREEDY, max_in_flight=4)) as iterator:
        assert source.read == 0, "nothing is read before the first output is asked for"
        for count in range(1, 30):
            output = next(iterator)
            assert output.finished
            assert source.read <= count + 4
    assert_idle(llm)


@pytest.mark.parametrize("bound", [1, 3])
def test_generate_iter__no_more_requests_than_asked_for_are_under_way(llm: LLM, bound: int) -> None:
    source, taken = Source(12), 0
    with recorded_steps(llm) as steps:
        for _ in llm.generate_iter(source, GREEDY, max_in_flight=bound):
            taken += 1
    assert (source.read, taken) == (12, 12)
    assert max(len(step.ranges) for step in steps) == bound
    assert_idle(llm)


def test_generate_iter__by_default_the_engine_is_always_full(checkpoint: Path) -> None:
    with LLM(str(checkpoint), dtype="float32", max_num_seqs=3) as llm:
        source = Source(50)
        with recorded_steps(llm) as steps:
            iterator = llm.generate_iter(source, GREEDY)
            next(iterator)
            assert 6 <= source.read <= 7, "twice max_num_seqs, besides the one that was yielded"
            assert sum(1 for _ in iterator) == 49
        assert all(len(step.ranges) == 3 for step in steps[:-10])


def test_generate_iter__outputs_come_as_they_finish(llm: LLM) -> None:
    params = [length(n) for n in (9, 1, 5)]
    first = None
    order = []
    for output in llm.generate_iter([[1], [2], [3]], params, max_in_flight=3):
        first = int(output.request_id) - output.prompt_token_ids[0] if first is None else first
        order.append(output.prompt_token_ids[0])
        assert int(output.request_id) == first + output.prompt_token_ids[0]
    assert order == [2, 3, 1]


def test_generate_iter__takes_generators_of_prompts_and_of_params(llm: LLM) -> None:
    outputs = list(llm.generate_iter((p for p in ("a", [1, 2], {"prompt": "b"})), (length(n) for n in (2, 2, 2))))
    assert [o.prompt for o in outputs] == ["a", None, "b"]
    assert list(llm.generate_iter([])) == []
    assert [len(o.outputs[0].token_ids) for o in llm.generate_iter(["a"], iter([GREEDY, GREEDY]))] == [5]


def test_generate_iter__without_params_the_defaults_are_used(llm: LLM) -> None:
    (output,) = llm.generate_iter([[1, 2]])
    assert 1 <= len(output.outputs[0].token_ids) <= 16


def raise_in_the_loop(iterator) -> None:
    for _ in iterator:
        raise KeyError


@pytest.mark.parametrize("leave", ["break", "close", "raise", "drop"])
def test_generate_iter__leaving_early_empties_the_engine(llm: LLM, leave: str) -> None:
    iterator = llm.generate_iter(Source(100), length(50), max_in_flight=8)
    if leave == "raise":
        with pytest.raises(KeyError):
            raise_in_the_loop(iterator)
    elif leave == "break":
        for _ in iterator:
            break
    else:
        next(iterator)
    if leave != "drop":
        iterator.close()
    del iterator
    assert_idle(llm)
    assert [o.prompt for o in run(llm, ["good"], GREEDY)] == ["good"]


def test_generate_iter__another_call_may_run_inside_the_loop(llm: LLM) -> None:
    expected = ids(run(llm, list(Source(6)), GREEDY))
    (inner_expected,) = ids(run(llm, ["inner"], length(9)))
    outputs = []
    for output in llm.generate_iter(Source(6), GREEDY, max_in_flight=3):
        outputs.append(output)
        (inner,) = llm.generate("inner", length(9), use_tqdm=False)
        assert list(inner.outputs[0].token_ids) == inner_expected
        assert inner.prompt == "inner"
    assert ids(sorted(outputs, key=lambda o: int(o.request_id))) == expected
    assert_idle(llm)


def test_generate_iter__two_may_be_read_in_turns(llm: LLM) -> None:
    expected = ids(run(llm, list(Source(6)), GREEDY))
    pairs = list(zip(llm.generate_iter(Source(6), GREEDY, max_in_flight=2), llm.generate_iter(Source(6), GREEDY, max_in_flight=1), strict=True))
    for side in (0, 1):
        assert ids(sorted((pair[side] for pair in pairs), key=lambda o: int(o.request_id))) == expected
    assert_idle(llm)


@pytest.mark.parametrize(("kwargs", "error", "message"), [
    ({"max_in_flight": 0}, ValueError, "max_in_flight"), ({"max_in_flight": 1.5}, ValueError, "max_in_flight"), ({"on_error": "x"}, ValueError, "on_error"),
    ({"priority": "high"}, ValueError, "priority"), ({"priority": 1.5}, TypeError, "priority"), ({"sampling_params": 5}, TypeError, "sampling_params"),
    ({"prompts": "a text"}, TypeError, "iterable of prompts"), ({"prompts": None}, TypeError, "iterable of prompts"), ({"prompts": {"prompt": "a"}}, TypeError, "iterable of prompts"),
])
def test_generate_iter__wrong_arguments_raise_at_once(llm: LLM, kwargs: dict, error, message: str) -> None:
    with pytest.raises(error, match=message):
        llm.generate_iter(**{"prompts": ["a"], "sampling_params": GREEDY} | kwargs)


@pytest.mark.parametrize(("bad", "error"), [([10**6], RequestValidationError), (None, RequestTypeError), ([1] * 100, RequestValidationError),
                                            ({"x": 1}, RequestTypeError)], ids=lambda v: repr(v)[:12])
def test_generate_iter__a_bad_prompt_raises_when_it_is_read_or_is_returned(llm: LLM, bad, error) -> None:
    iterator = llm.generate_iter([[1], [2], bad, [3]], GREEDY, max_in_flight=1)
    assert [next(iterator).prompt_token_ids for _ in range(2)] == [[1], [2]]
    with pytest.raises(error):
        next(iterator)
    assert list(iterator) == []
    assert_idle(llm)
    outputs = list(llm.generate_iter([[1], [2], bad, [3]], GREEDY, max_in_flight=1, on_error="return"))
    assert [type(o.error) for o in outputs] == [type(None), type(None), error, type(None)]
    assert_idle(llm)


def test_generate_iter__refused_prompts_that_are_returned_count_as_read_too(llm: LLM) -> None:
    """Else a source of nothing but bad prompts would be read to its end, and all its errors kept."""
    source = Source(1000)
    with closing(llm.generate_iter(([10**6] for _ in source), GREEDY, max_in_flight=4, on_error="return")) as iterator:
        assert isinstance(next(iterator).error, RequestValidationError)
        assert source.read <= 5


def test_generate_iter__a_request_that_fails_raises_or_is_returned(llm: LLM) -> None:
    params = [GREEDY, SamplingParams(temperature=0, logits_processors=[fails_at(1)]), GREEDY]
    expected = ids(run(llm, ["a", "c"], GREEDY))
    with pytest.raises(RequestFailedError, match="made to fail"):
        list(llm.generate_iter(["a", "b", "c"], params))
    assert_idle(llm)
    outputs = {o.prompt: o for o in llm.generate_iter(["a", "b", "c"], params, on_error="return")}
    assert isinstance(outputs["b"].error, RequestFailedError)
    assert ids([outputs["a"], outputs["c"]]) == expected
    assert_idle(llm)


def test_generate_iter__params_that_end_first_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestValidationError, match="The lengths of prompts and params must be the same") as caught:
        list(llm.generate_iter(["a", "b"], iter([GREEDY])))
    assert caught.value.parameter == "sampling_params"
    assert_idle(llm)


def test_generate_iter__params_of_another_type_are_refused_when_they_are_read(llm: LLM) -> None:
    iterator = llm.generate_iter(["a", "b"], [GREEDY, {"temperature": 0}], max_in_flight=1)
    assert next(iterator).prompt == "a"
    with pytest.raises(RequestTypeError, match="sampling_params"):
        next(iterator)
    assert_idle(llm)


def test_generate_iter__a_source_that_raises_empties_the_engine(llm: LLM) -> None:
    def source() -> Iterator[str]:
        yield "a"
        yield "b"
        raise OSError("the file ended")

    with pytest.raises(OSError, match="the file ended"):
        list(llm.generate_iter(source(), GREEDY))
    assert_idle(llm)


def test_generate_iter__samples_and_texts_are_those_of_generate(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=2, max_tokens=6, stop=["a", "e"], logprobs=1)
    (expected,), (found,) = run(llm, ["x"], params), llm.generate_iter(["x"], params)
    assert found.outputs == expected.outputs
    assert found.prompt_token_ids == expected.prompt_token_ids == [BOS, ord("x")]


def test_generate_iter__a_closed_engine_says_so(checkpoint: Path) -> None:
    llm = LLM(str(checkpoint), dtype="float32")
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate_iter(["a"], GREEDY)
