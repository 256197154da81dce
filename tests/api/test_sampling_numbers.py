"""`SamplingParams`, end to end: how many completions, and what decides which tokens they have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from api_helpers import (
    Truth,
    assert_idle,
    check_drawn,
    complete,
    computed_of_prompts,
    drawn,
    ids,
    is_set_to,
    recorded_steps,
    run,
    writes,
)

from kvloom import LLM, RequestOutputKind, SamplingParams
from kvloom.errors import RequestValidationError
from kvloom.testing.checkpoints import EOS, VOCAB_SIZE

PROMPT = [5, 6, 7, 7, 100, 3]
LONG = [(7 * i) % 250 for i in range(100)]


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32", max_model_len=200) as made:
        yield made


def samples(llm: LLM, prompt, **params) -> list[list[int]]:
    """Tokens of every completion of one prompt."""
    (output,) = run(llm, [prompt], SamplingParams(**{"max_tokens": 8, "ignore_eos": True} | params))
    assert [o.index for o in output.outputs] == list(range(len(output.outputs)))
    return [list(o.token_ids) for o in output.outputs]


def probabilities(truth: Truth, temperature: float = 1.0) -> torch.Tensor:
    return (truth.after(PROMPT) / temperature).softmax(-1)


def refused(llm: LLM, params: SamplingParams, parameter: str, prompts=("a", PROMPT)) -> RequestValidationError:
    """Nothing is computed and nothing stays."""
    with recorded_steps(llm) as steps, pytest.raises(RequestValidationError) as caught:
        llm.generate(list(prompts), params, use_tqdm=False)
    assert steps == []
    assert caught.value.parameter == parameter
    assert isinstance(caught.value, ValueError)
    assert_idle(llm)
    return caught.value


# -- n

def test_n__that_many_different_samples_in_order(llm: LLM) -> None:
    found = samples(llm, PROMPT, n=5, seed=3)
    assert len(found) == 5
    assert len({tuple(t) for t in found}) == 5


def test_n__a_sample_does_not_depend_on_how_many_there_are_or_on_neighbours(llm: LLM) -> None:
    five = samples(llm, PROMPT, n=5, seed=3)
    assert samples(llm, PROMPT, n=2, seed=3) == five[:2]
    assert samples(llm, PROMPT, seed=3) == five[:1]
    params = SamplingParams(n=5, seed=3, max_tokens=8, ignore_eos=True)
    other = SamplingParams(n=3, seed=4, max_tokens=11, ignore_eos=True)
    outputs = run(llm, [LONG, PROMPT, "x"], [other, params, other])
    assert [list(o.token_ids) for o in outputs[1].outputs] == five


def test_n__samples_are_independent_draws_of_the_models_distribution(llm: LLM, truth: Truth) -> None:
    check_drawn(drawn(llm, PROMPT), probabilities(truth))


def test_n__each_sample_ends_by_itself(llm: LLM) -> None:
    (output,) = run(llm, [PROMPT], SamplingParams(n=40, seed=1, max_tokens=12, stop_token_ids=list(range(64))))
    reasons = {o.finish_reason for o in output.outputs}
    assert reasons == {"stop", "length"}
    for o in output.outputs:
        assert all(t >= 64 for t in o.token_ids[:-1])
        assert (o.token_ids[-1] < 64 or o.token_ids[-1] == EOS) == (o.finish_reason == "stop")


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("prompt_tokens", [100, 96])
def test_n__the_prompt_is_computed_once_and_its_blocks_are_shared(checkpoint: Path, caching: bool, prompt_tokens: int) -> None:
    """Siblings compute what is after the last full block; the last token is always computed."""
    prompt, shared = LONG[:prompt_tokens], (prompt_tokens - 1) // 16 * 16
    with LLM(str(checkpoint), dtype="float32", enable_prefix_caching=caching) as llm:
        with recorded_steps(llm) as steps:
            found = samples(llm, prompt, n=4, seed=1)
        assert computed_of_prompts(steps, prompt_tokens) == prompt_tokens + 3 * (prompt_tokens - shared)
        with recorded_steps(llm) as steps:
            assert samples(llm, prompt, n=4, seed=1) == found
        again = 4 * (prompt_tokens - shared) if caching else prompt_tokens + 3 * (prompt_tokens - shared)
        assert computed_of_prompts(steps, prompt_tokens) == again


def test_n__more_samples_than_run_at_once(checkpoint: Path, llm: LLM) -> None:
    with LLM(str(checkpoint), dtype="float32", max_num_seqs=3) as narrow:
        assert samples(narrow, PROMPT, n=10, seed=9) == samples(llm, PROMPT, n=10, seed=9)


def test_n__samples_survive_a_cache_that_is_too_small_for_all(checkpoint: Path, llm: LLM) -> None:
    params = SamplingParams(n=6, seed=9, max_tokens=40, ignore_eos=True)
    with LLM(str(checkpoint), dtype="float32", num_gpu_blocks_override=12, max_model_len=200) as small:
        (output,) = run(small, [LONG[:50]], params)
    assert output.metrics.num_preemptions > 0
    (expected,) = run(llm, [LONG[:50]], params)
    assert [o.token_ids for o in output.outputs] == [o.token_ids for o in expected.outputs]


def test_n__greedy_requests_may_have_only_one(llm: LLM) -> None:
    params = SamplingParams(n=2)
    params.temperature = 0.0
    assert "must be 1 when temperature is 0" in str(refused(llm, params, "n"))


# -- best_of

def test_best_of__the_n_with_the_largest_cumulative_logprob_come_best_first(llm: LLM, truth: Truth) -> None:
    common = {"seed": 3, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
    (everything,) = run(llm, [PROMPT], SamplingParams(n=7, **common))
    (best,) = run(llm, [PROMPT], SamplingParams(n=2, best_of=7, **common))
    expected = sorted(everything.outputs, key=lambda o: -o.cumulative_logprob)[:2]
    assert [(o.token_ids, o.cumulative_logprob) for o in best.outputs] == [(o.token_ids, o.cumulative_logprob) for o in expected]
    assert [o.index for o in best.outputs] == [0, 1]
    for done in best.outputs:
        truth.check_output(PROMPT, done, 0)


def test_best_of__without_logprobs_the_same_are_returned_and_show_none(llm: LLM) -> None:
    common = {"n": 2, "best_of": 7, "seed": 3, "max_tokens": 8, "ignore_eos": True}
    (plain,), (shown,) = (run(llm, [PROMPT], SamplingParams(**common, logprobs=k)) for k in (None, 2))
    assert [o.token_ids for o in plain.outputs] == [o.token_ids for o in shown.outputs]
    assert all(o.logprobs is None and o.cumulative_logprob is None for o in plain.outputs)
    assert all(len(o.logprobs) == 8 for o in shown.outputs)


def test_best_of__equal_to_n_is_n_in_its_order(llm: LLM) -> None:
    assert samples(llm, PROMPT, n=4, best_of=4, seed=5) == samples(llm, PROMPT, n=4, seed=5)


def test_best_of__counts_all_samples_in_the_metrics(llm: LLM) -> None:
    (output,) = run(llm, [PROMPT], SamplingParams(n=1, best_of=3, seed=5, max_tokens=4, ignore_eos=True))
    assert len(output.outputs) == 1
    assert output.metrics.num_generation_tokens == 12


def test_best_of__at_least_n_and_with_delta_exactly_n(llm: LLM) -> None:
    params = SamplingParams(n=2, best_of=2)
    params.best_of = 1
    refused(llm, params, "best_of")
    with pytest.raises(RequestValidationError, match="best_of must equal n") as caught:
        SamplingParams(n=1, best_of=2, output_kind=RequestOutputKind.DELTA)
    assert caught.value.parameter == "best_of"
    assert SamplingParams(n=2, best_of=2, output_kind=RequestOutputKind.DELTA).num_sequences == 2


# -- penalties

def counted(output: list[int]) -> torch.Tensor:
    return torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=VOCAB_SIZE).float()


BIAS = dict.fromkeys((5, 6, 100, 9, 10, 11, 12, 20), 7.0)
"""Makes a few tokens, some of them the prompt's, win again and again, so that penalties matter."""


def biased(logits: torch.Tensor) -> torch.Tensor:
    return logits + torch.tensor([BIAS.get(i, 0.0) for i in range(VOCAB_SIZE)])


def greedy_with(llm: LLM, **params) -> list[int]:
    return list(complete(llm, PROMPT, temperature=0, max_tokens=24, ignore_eos=True, logit_bias=BIAS, **params).token_ids)


@pytest.mark.parametrize("amount", [2.0, 1.3, -2.0])
def test_presence_penalty__taken_once_from_each_token_of_the_output(llm: LLM, truth: Truth, amount: float) -> None:
    expected = truth.greedy(PROMPT, 24, lambda logits, output: biased(logits) - amount * (counted(output) > 0))
    assert greedy_with(llm, presence_penalty=amount) == expected
    assert expected != truth.greedy(PROMPT, 24, lambda logits, output: biased(logits))


@pytest.mark.parametrize("amount", [1.7, 0.3, -0.4])
def test_frequency_penalty__taken_once_an_occurrence_in_the_output(llm: LLM, truth: Truth, amount: float) -> None:
    expected = truth.greedy(PROMPT, 24, lambda logits, output: biased(logits) - amount * counted(output))
    assert greedy_with(llm, frequency_penalty=amount) == expected
    assert expected != truth.greedy(PROMPT, 24, lambda logits, output: biased(logits) - amount * (counted(output) > 0))


@pytest.mark.parametrize("amount", [3.0, 1.2, 0.8])
def test_repetition_penalty__divides_positive_and_multiplies_other_logits_of_prompt_and_output(llm: LLM, truth: Truth, amount: float) -> None:
    def penalised(logits: torch.Tensor, seen: list[int]) -> torch.Tensor:
        logits, there = biased(logits), counted(seen) > 0
        return torch.where(there, torch.where(logits > 0, logits / amount, logits * amount), logits)

    expected = truth.greedy(PROMPT, 24, lambda logits, output: penalised(logits, PROMPT + output))
    assert greedy_with(llm, repetition_penalty=amount) == expected
    assert expected != truth.greedy(PROMPT, 24, lambda logits, output: penalised(logits, output)), "the prompt counts too"


def test_repetition_penalty__a_negative_logit_gets_smaller(llm: LLM) -> None:
    def one_negative_logit_is_best(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits.fill_(-10.0)
        logits[3], logits[200] = -4.0, -5.0  # 3 is in the prompt
        return logits

    functions = [one_negative_logit_is_best]
    assert greedy_with(llm, logits_processors=functions)[0] == 3
    assert greedy_with(llm, logits_processors=functions, repetition_penalty=1.5)[0] == 200


# -- temperature

@pytest.mark.parametrize("temperature", [0.5, 1.7, 2.0])
def test_temperature__divides_the_logits(llm: LLM, truth: Truth, temperature: float) -> None:
    check_drawn(drawn(llm, PROMPT, temperature=temperature), probabilities(truth, temperature))


def test_temperature__zero_takes_the_best_token(llm: LLM, truth: Truth) -> None:
    found = complete(llm, PROMPT, temperature=0, max_tokens=20, ignore_eos=True)
    assert list(found.token_ids) == truth.greedy(PROMPT, 20)


def test_temperature__below_1e_5_is_greedy(llm: LLM) -> None:
    assert samples(llm, PROMPT, temperature=9e-6) == samples(llm, PROMPT, temperature=0)


def test_temperature__small_ones_are_raised_with_a_warning(llm: LLM, capsys) -> None:
    params = SamplingParams(temperature=0.003, seed=1, max_tokens=8, ignore_eos=True)
    assert params.temperature == 0.01
    assert "temperature raised" in "".join(capsys.readouterr())
    assert ids(run(llm, [PROMPT], params))[0] == samples(llm, PROMPT, temperature=0.01, seed=1)[0]


def test_temperature__greedy_resets_the_filters_on_the_object() -> None:
    params = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.2)
    assert (params.top_p, params.top_k, params.min_p) == (1.0, -1, 0.0)


# -- top_p, top_k, min_p

@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8])
def test_top_p__the_smallest_set_of_best_tokens_with_that_mass(llm: LLM, truth: Truth, top_p: float) -> None:
    mass, order = probabilities(truth).sort(descending=True)
    keep = order[: int((mass.cumsum(0) < top_p).sum()) + 1]
    expected = torch.zeros(VOCAB_SIZE)
    expected[keep] = probabilities(truth)[keep]
    assert 1 <= len(keep) < VOCAB_SIZE
    found = drawn(llm, PROMPT, top_p=top_p)
    check_drawn(found, expected / expected.sum())
    if top_p < 0.5:
        assert set(found) == set(keep.tolist())


def test_top_p__at_least_one_token_is_left_and_one_is_off(llm: LLM, truth: Truth) -> None:
    assert set(drawn(llm, PROMPT, count=50, top_p=1e-9)) == {int(truth.after(PROMPT).argmax())}
    assert samples(llm, PROMPT, top_p=1.0, seed=2) == samples(llm, PROMPT, seed=2)


@pytest.mark.parametrize("top_k", [1, 2, 7])
def test_top_k__the_k_best_tokens(llm: LLM, truth: Truth, top_k: int) -> None:
    keep = probabilities(truth).topk(top_k).indices
    expected = torch.zeros(VOCAB_SIZE)
    expected[keep] = probabilities(truth)[keep]
    found = drawn(llm, PROMPT, count=500, top_k=top_k)
    assert set(found) == set(keep.tolist())
    check_drawn(found, expected / expected.sum())


def test_top_k__ties_with_the_last_are_kept(llm: LLM) -> None:
    found = drawn(llm, PROMPT, count=300, top_k=2, logits_processors=[is_set_to([0.4, 0.2, 0.2, 0.2])])
    assert set(found) == {0, 1, 2, 3}
    found = drawn(llm, PROMPT, count=300, top_k=2, logits_processors=[is_set_to([0.4, 0.3, 0.2, 0.1])])
    assert set(found) == {0, 1}


@pytest.mark.parametrize("off", [-1, 0, VOCAB_SIZE, 10**6])
def test_top_k__none_and_more_than_there_are_change_nothing(llm: LLM, off: int) -> None:
    assert samples(llm, PROMPT, top_k=off, seed=2) == samples(llm, PROMPT, seed=2)


@pytest.mark.parametrize(("min_p", "temperature"), [(0.3, 1.0), (0.3, 2.0), (0.2, 0.5)])
def test_min_p__tokens_with_that_share_of_the_best_after_temperature(llm: LLM, truth: Truth, min_p: float, temperature: float) -> None:
    mass = probabilities(truth, temperature)
    expected = torch.where(mass >= min_p * mass.max(), mass, 0)
    assert 1 < (expected > 0).sum() < VOCAB_SIZE
    check_drawn(drawn(llm, PROMPT, min_p=min_p, temperature=temperature), expected / expected.sum())


def test_min_p__one_leaves_the_best_and_zero_is_off(llm: LLM, truth: Truth) -> None:
    assert set(drawn(llm, PROMPT, count=50, min_p=1.0)) == {int(truth.after(PROMPT).argmax())}
    assert samples(llm, PROMPT, min_p=0.0, seed=2) == samples(llm, PROMPT, seed=2)


# -- seed

def test_seed__the_same_seed_and_prompt_give_the_same_whatever_the_neighbours(llm: LLM) -> None:
    params = SamplingParams(seed=11, max_tokens=12, ignore_eos=True)
    others = SamplingParams(max_tokens=20, ignore_eos=True, presence_penalty=1.0)
    (alone,) = ids(run(llm, [PROMPT], params))
    assert ids(run(llm, [LONG, "abc", PROMPT, [1]], [others, others, params, others]))[2] == alone
    assert ids(run(llm, [PROMPT] * 2, params)) == [alone, alone]


def test_seed__another_seed_gives_another_output(llm: LLM) -> None:
    assert len({tuple(samples(llm, PROMPT, seed=s)[0]) for s in (0, 1, 2**32, 2**63, 2**64 - 1, -2)}) == 6


def test_seed__none_and_minus_one_differ_from_request_to_request(llm: LLM) -> None:
    assert SamplingParams(seed=-1).seed is None
    assert len({tuple(samples(llm, PROMPT, seed=s)[0]) for s in (None, None, -1, -1)}) == 4


# -- logit_bias

def test_logit_bias__is_added_to_the_logits(llm: LLM, truth: Truth) -> None:
    bias = {11: 2.5, 200: -3.0, 91: -0.5}
    logits = truth.after(PROMPT)
    for token_id, amount in bias.items():
        logits[token_id] += amount
    check_drawn(drawn(llm, PROMPT, logit_bias=bias), logits.softmax(-1))


def test_logit_bias__is_not_clamped_by_the_constructor(llm: LLM) -> None:
    first_has_it = [is_set_to([1.0 - 1e-30, 1e-30])]
    common = {"temperature": 0, "max_tokens": 1, "logits_processors": first_has_it}
    assert SamplingParams(logit_bias={1: 500.0}).logit_bias == {1: 500.0}
    assert complete(llm, PROMPT, temperature=0, max_tokens=1, logit_bias={1: 500.0, 2: 400.0}).token_ids == [1]
    assert complete(llm, PROMPT, **common, logit_bias={1: 500.0}).token_ids == [0], "the function runs later"


def test_logit_bias__from_optional_clamps_and_takes_texts_as_ids(llm: LLM, truth: Truth) -> None:
    params = SamplingParams.from_optional(logit_bias={"40": 500, 41: -500.0, "42": 1}, temperature=0, max_tokens=1)
    assert params.logit_bias == {40: 100.0, 41: -100.0, 42: 1.0}
    assert ids(run(llm, [PROMPT], params)) == [[40]]
    with pytest.raises(RequestValidationError, match="logit_bias"):
        SamplingParams.from_optional(logit_bias={"forty": 1})


def test_logit_bias__an_id_out_of_the_vocabulary_is_refused(llm: LLM) -> None:
    error = refused(llm, SamplingParams(logit_bias={1: 1.0, VOCAB_SIZE: 1.0}), "logit_bias")
    assert "out of vocabulary" in str(error)
    assert error.value == VOCAB_SIZE


# -- allowed_token_ids

def test_allowed_token_ids__all_others_are_impossible(llm: LLM, truth: Truth) -> None:
    allowed = [250, 11, 91, 0]
    expected = torch.zeros(VOCAB_SIZE)
    expected[allowed] = probabilities(truth)[allowed]
    check_drawn(drawn(llm, PROMPT, allowed_token_ids=allowed), expected / expected.sum())


def test_allowed_token_ids__the_best_of_them_at_every_position(llm: LLM, truth: Truth) -> None:
    allowed = list(range(0, VOCAB_SIZE, 7))
    forbidden = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    forbidden[allowed] = False
    expected = truth.greedy(PROMPT, 12, lambda logits, output: logits.masked_fill(forbidden, -torch.inf))
    assert samples(llm, PROMPT, temperature=0, max_tokens=12, allowed_token_ids=allowed) == [expected]


def test_allowed_token_ids__an_id_out_of_the_vocabulary_and_an_empty_list_are_refused(llm: LLM) -> None:
    assert "out of vocabulary" in str(refused(llm, SamplingParams(allowed_token_ids=[1, VOCAB_SIZE]), "allowed_token_ids"))
    params = SamplingParams(allowed_token_ids=[1])
    params.allowed_token_ids = []
    refused(llm, params, "allowed_token_ids")


# -- the order inside a step

class Seen:
    """Remembers the logits that a function of the request gets."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        self.logits.append(logits.clone())
        return logits


def test_order__allowed_ids_bad_words_min_tokens_and_bias_come_before_functions_and_penalties_after(llm: LLM, truth: Truth) -> None:
    seen, allowed = Seen(), [*range(97, 123), EOS]
    (output,) = run(llm, [PROMPT], SamplingParams(
        temperature=0.5, seed=1, max_tokens=2, allowed_token_ids=allowed, bad_words=["z"], min_tokens=1,
        logit_bias={97: 2.0, 122: 50.0, EOS: 60.0, 5: 70.0}, logits_processors=[seen], presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=2.0))
    first, second = seen.logits
    raw = truth.after(PROMPT)
    for i in range(VOCAB_SIZE):
        if i not in allowed or i in (122, EOS):
            assert first[i] == -torch.inf, "what is forbidden stays so, whatever is added"
        else:
            assert abs(first[i] - raw[i] - (2.0 if i == 97 else 0.0)) < 1e-4, "neither penalties nor temperature yet"
    assert torch.isfinite(second[EOS]), "min_tokens is over"
    assert output.outputs[0].finish_reason == "stop"


def test_order__penalties_come_after_functions(llm: LLM) -> None:
    """The function gives the prompt's token 3 and token 200 the same; only a penalty applied to what it gave tells them apart."""

    def two_are_equal(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(logits, -50.0)
        out[3], out[200] = 2.0, 1.0
        return out

    found = samples(llm, PROMPT, temperature=0, max_tokens=2, repetition_penalty=4.0, logits_processors=[two_are_equal])
    assert found == [[200, 3]], "2 / 4 < 1, then 1 / 4 < 2 / 4"


def test_order__repetition_then_frequency_and_presence(llm: LLM) -> None:
    def set_logits(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(logits, -50.0)
        out[20], out[21] = (9.0, 0.0) if not output_ids else (4.0, 0.5)
        return out

    common = {"temperature": 0, "max_tokens": 2, "frequency_penalty": 1.0, "presence_penalty": 0.4, "logits_processors": [set_logits]}
    assert samples(llm, PROMPT, repetition_penalty=2.0, **common) == [[20, 20]], "4 / 2 - 1.4 = 0.6; the other way round it were 1.3"
    assert samples(llm, PROMPT, repetition_penalty=2.2, **common) == [[20, 21]], "4 / 2.2 - 1.4 = 0.42; the other way round 1.18"


def test_order__temperature_comes_after_penalties_and_functions(llm: LLM) -> None:
    def two_logits(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(logits, -torch.inf)
        out[3], out[200] = 2.0, 0.5
        return out

    expected = torch.zeros(VOCAB_SIZE)
    expected[[3, 200]] = torch.tensor([2.0 / 2.0 / 0.5, 0.5 / 0.5]).softmax(-1)
    check_drawn(drawn(llm, PROMPT, temperature=0.5, repetition_penalty=2.0, logits_processors=[two_logits]), expected)


def test_order__min_p_comes_after_temperature(llm: LLM) -> None:
    """0.1 has a quarter of the best's probability; at temperature 2 half of it."""
    function = [is_set_to([0.4, 0.3, 0.2, 0.1])]
    assert set(drawn(llm, PROMPT, count=300, min_p=0.4, logits_processors=function)) == {0, 1, 2}
    assert set(drawn(llm, PROMPT, count=300, min_p=0.4, temperature=2.0, logits_processors=function)) == {0, 1, 2, 3}


def test_order__min_p_comes_before_top_p(llm: LLM) -> None:
    """Without the last, whose share min_p finds too small, the first two have 0.8 of the mass; else they have 0.72."""
    found = drawn(llm, PROMPT, count=300, min_p=0.3, top_p=0.75, logits_processors=[is_set_to([0.5, 0.22, 0.18, 0.1])])
    assert set(found) == {0, 1}


def test_order__top_k_comes_before_top_p(llm: LLM) -> None:
    """The best of two has 0.57 of their mass; of all four it has 0.4."""
    found = drawn(llm, PROMPT, count=300, top_k=2, top_p=0.5, logits_processors=[is_set_to([0.4, 0.3, 0.2, 0.1])])
    assert set(found) == {0}


def test_order__returned_logprobs_are_those_of_the_raw_logits(llm: LLM, truth: Truth) -> None:
    (output,) = run(llm, [PROMPT], SamplingParams(
        temperature=1.5, seed=1, max_tokens=8, ignore_eos=True, logprobs=5, top_k=5, top_p=0.9, min_p=0.01, presence_penalty=2.0, repetition_penalty=1.5,
        logit_bias={91: -50.0}, allowed_token_ids=list(range(200)), bad_words=["a"], logits_processors=[writes([1, 2, 3, 4])]))
    (done,) = output.outputs
    assert list(done.token_ids[:4]) == [1, 2, 3, 4]
    truth.check_output(PROMPT, done, 5)
