"""No parameter takes NaN, infinity, a bool for a number, or a number out of range; what is not built yet says so."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom import SamplingParams
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


@pytest.mark.parametrize(("name", "value"), [("n", 2), ("top_p", 0.5), ("top_k", 5), ("logprobs", 1), ("stop", "x"), ("logit_bias", {1: 1.0}),
                                             ("presence_penalty", 1.0), ("min_tokens", 1), ("logits_processors", [print])])
def test_a_field_that_is_not_built_yet_says_what_works(name: str, value: object) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"{name}=.* is not supported so far; leave it at"):
        SamplingParams(**{name: value})
