"""No parameter takes NaN, infinity, a bool for a number, or a number out of range; what is not built yet says so."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom import BeamSearchParams, GuidedDecodingParams, PoolingParams, RequestOutputKind, SamplingParams, StructuredOutputsParams
from kvloom.errors import RequestValidationError, UnsupportedFeatureError

ANYTHING = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=3),
                     st.dictionaries(st.integers(), st.floats(), max_size=2), st.binary(max_size=2))


@given(name=st.sampled_from([f.name for f in fields(SamplingParams)]), value=ANYTHING)
def test_every_field_takes_a_sound_value_or_refuses_it_by_name(name: str, value: object) -> None:
    try:
        params = SamplingParams(**{name: value})
    except (RequestValidationError, UnsupportedFeatureError) as error:
        assert error.parameter == name  # noqa: PT017
        assert name in str(error)  # noqa: PT017
        return
    assert math.isfinite(params.temperature)
    assert params.temperature >= 0
    assert params.max_tokens is None or (params.max_tokens >= 1 and params.max_tokens is not True)
    assert type(params.ignore_eos) is type(params.detokenize) is bool
    assert params == params.clone()


@pytest.mark.parametrize("value", ids=lambda v: type(v).__name__, argvalues=[float("nan"), float("inf"), -0.1, "1", True, None, 10**400, 10**5000])
def test_a_wrong_temperature_is_refused(value: object) -> None:
    with pytest.raises(RequestValidationError) as caught:
        SamplingParams(temperature=value)
    assert caught.value.parameter == "temperature"
    assert caught.value.value is value


@pytest.mark.parametrize(("given_value", "kept"), [(0, 0), (1e-6, 1e-6), (0.001, 0.01), (0.5, 0.5)])
def test_small_temperatures_are_raised_and_tiny_ones_greedy(given_value: float, kept: float) -> None:
    params = SamplingParams(temperature=given_value)
    assert params.temperature == kept
    assert params.is_greedy == (given_value < 1e-5)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(("name", "good", "bad"), [
    ("top_p", [1e-9, 0.5, 1, 1.0], [0, -0.1, 1.01, NAN, True, "1"]), ("top_k", [-1, 0, 1, 10**6], [-2, 1.5, True, "1"]),
    ("min_p", [0, 0.3, 1.0], [-0.1, 1.1, NAN, None]), ("presence_penalty", [-2, 2.0, 0], [-2.1, 3, INFINITY]),
    ("frequency_penalty", [-2, 2.0], [NAN, 2.5, True]), ("repetition_penalty", [0.1, 5], [0, -1, INFINITY, NAN]),
    ("min_tokens", [0, 16], [-1, 17, True, 1.0]), ("logit_bias", [{}, {3: -1.5}, {0: 2}], [{-1: 1.0}, {1: NAN}, {"1": 1.0}, [1], {True: 1.0}]),
    ("stop", ["x", ["x", "yy"], [], None], ["", [""], 5, [5], ["x"] * 65, "x" * 1025, {"x": 1}]),
    ("n", [1, 5, 16384], [0, -1, 16385, 1.0, True, None, 10**400]), ("best_of", [None, 1, 16384], [0, 16385, True, 2.0]),
    ("temperature", [0, 2, 0.5], [2.1, -1, NAN, INFINITY, True]), ("seed", [None, -1, 0, 2**64 - 1], [2**64, 1.0, True, "1"]),
    ("max_tokens", [None, 1], [0, -1, True, 1.5]), ("logprobs", [None, -1, 0, 20], [-2, 1.5, "1"]), ("prompt_logprobs", [None, -1, 0, 5], [-2, 0.5]),
    ("bad_words", [None, [], ["x"]], ["x", [""], [1], ["x"] * 129]), ("truncate_prompt_tokens", [None, -1, 1], [0, -2, 1.5, True]),
    ("logits_processors", [None, [], [print]], [print, [1], [print] * 17]), ("output_kind", [RequestOutputKind.DELTA], [1, "DELTA", None]),
    ("extra_args", [None, {}, {"x": {"y": [1, 2.5, None, "z"]}}], [[], {1: 2}, {"x": NAN}, {"x": 2**64}, {"x": object()}, {"x": "y" * 2**21}]),
    ("skip_special_tokens", [True, False], [1, None]), ("spaces_between_special_tokens", [False], ["no"]), ("include_stop_str_in_output", [True], [0]),
    ("allowed_token_ids", [[1], (2, 3)], [[], [-1], [True], "12", {1: 2}]), ("stop_token_ids", [[], [5]], [[-5], "5", [1.0]]),
])
def test_what_a_field_takes_and_what_it_refuses(name: str, good: list, bad: list) -> None:
    for value in good:
        SamplingParams(**{name: value})
    for value in bad:
        with pytest.raises(RequestValidationError, match=name):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(("cls", "given", "message"), [
    (SamplingParams, {"use_beam_search": True}, "LLM.beam_search"), (SamplingParams, {"length_penalty": 0.5}, "BeamSearchParams"),
    (SamplingParams, {"flat_logprobs": True}, "one dict a token"), (SamplingParams, {"thinking_token_budget": 5}, "use max_tokens"),
    (PoolingParams, {"normalize": False}, "use_activation"), (BeamSearchParams, {"beam_width": 2, "max_tokens": 3, "early_stopping": True}, "runs to max_tokens"),
    (BeamSearchParams, {"beam_width": 2, "max_tokens": 3, "structured_outputs": {"regex": "a"}}, "use generate with"),
    (PoolingParams, {"output_kind": RequestOutputKind.DELTA}, "has one output"),
    (GuidedDecodingParams, {"regex": "a", "disable_fallback": True}, "GuidedDecodingParams.disable_fallback"),
])
def test_fields_of_other_versions_are_refused_with_what_to_do(cls: type, given: dict, message: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=message):
        cls(**given)


def test_fields_of_other_versions_may_have_their_default() -> None:
    assert SamplingParams(use_beam_search=False, length_penalty=1.0, flat_logprobs=False, top_k=3) == SamplingParams(top_k=3)
    assert PoolingParams(normalize=None) == PoolingParams()


@pytest.mark.parametrize(("cls", "given", "near"), [
    (SamplingParams, {"temprature": 1.0}, "temperature"), (PoolingParams, {"dimension": 3}, "dimensions"), (GuidedDecodingParams, {"regexp": "a"}, "regex"),
    (BeamSearchParams, {"beam_size": 3}, "beam_width|unexpected"),
])
def test_names_that_nobody_knows_are_a_type_error_with_the_near_name(cls: type, given: dict, near: str) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__}.. got an unexpected keyword argument.*({near})"):
        cls(**given)


def test_parameter_classes_stay_data() -> None:
    params = SamplingParams(temperature=0.5, stop=["x"], structured_outputs=StructuredOutputsParams(choice=["a"]))
    assert pickle.loads(pickle.dumps(params)) == params == copy.deepcopy(params) == replace(params)
    assert list(inspect.signature(SamplingParams).parameters)[:3] == ["n", "best_of", "presence_penalty"]
    assert "temperature=0.5" in repr(params)
