"""Log-probabilities of output and prompt tokens, against those of transformers' logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_helpers import Truth, assert_idle, computed_of_prompts, recorded_steps, run, writes

from kvloom import LLM, SamplingParams
from kvloom.errors import RequestValidationError
from kvloom.live_request import Call
from kvloom.testing.checkpoints import BOS, VOCAB_SIZE

PROMPT = [5, 6, 7, 7, 100, 3]
LONG = [(11 * i + i // 7) % 250 for i in range(150)]


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32") as made:
        yield made


def sampled(**params) -> SamplingParams:
    return SamplingParams(**{"seed": 1, "max_tokens": 10, "ignore_eos": True} | params)


# -- logprobs

def test_logprobs__none_leaves_them_and_the_sum_out(llm: LLM) -> None:
    ((done,),) = (o.outputs for o in run(llm, [PROMPT], sampled()))
    assert done.logprobs is None
    assert done.cumulative_logprob is None


@pytest.mark.parametrize("wanted", [0, 1, 5, 20])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logprobs__n_best_and_the_sampled_token_with_ranks(llm: LLM, truth: Truth, wanted: int, temperature: float) -> None:
    (output,) = run(llm, [PROMPT], sampled(logprobs=wanted, temperature=temperature))
    (done,) = output.outputs
    truth.check_output(PROMPT, done, wanted)
    if temperature == 0:
        assert all(c[t].rank == 1 for c, t in zip(done.logprobs, done.token_ids, strict=True))
    if wanted == 1 and temperature:
        assert {len(c) for c in done.logprobs} == {1, 2}, "the sampled token is not always the best"


def test_logprobs__texts_are_those_of_the_tokens_alone(llm: LLM) -> None:
    (output,) = run(llm, [PROMPT], sampled(logprobs=20, max_tokens=4))
    decode = llm.get_tokenizer().decode
    for candidates in output.outputs[0].logprobs:
        assert all(c.decoded_token == decode([i], skip_special_tokens=False) for i, c in candidates.items())


def test_logprobs__true_is_one_and_false_is_none(llm: LLM, truth: Truth) -> None:
    (one,), (none,) = (run(llm, [PROMPT], sampled(logprobs=given, prompt_logprobs=given)) for given in (True, False))
    truth.check_output(PROMPT, one.outputs[0], 1)
    truth.check_prompt(PROMPT, one, 1)
    assert none.outputs[0].logprobs is none.prompt_logprobs is None


def test_logprobs__the_stop_token_and_a_cut_off_text_keep_theirs(llm: LLM, truth: Truth) -> None:
    prompt = [BOS, *b"xy"]
    for stop in ({"stop": "c"}, {"stop_token_ids": [ord("c")]}):
        (output,) = run(llm, "xy", sampled(logprobs=2, logits_processors=[writes("abcd")], **stop))
        assert output.outputs[0].text == "ab"
        assert len(output.outputs[0].logprobs) == 3
        truth.check_output(prompt, output.outputs[0], 2)


def test_logprobs__rows_of_a_batch_get_what_they_asked_for(llm: LLM, truth: Truth) -> None:
    wanted = [None, 3, 0, None, 20, 3]
    prompts = [LONG[i:i + 5 + 3 * i] for i in range(len(wanted))]
    outputs = run(llm, prompts, [sampled(logprobs=k) for k in wanted])
    for prompt, output, k in zip(prompts, outputs, wanted, strict=True):
        if k is None:
            assert output.outputs[0].logprobs is None
        else:
            truth.check_output(prompt, output.outputs[0], k)


def test_logprobs__each_sample_has_its_own(llm: LLM, truth: Truth) -> None:
    (output,) = run(llm, [PROMPT], sampled(n=3, logprobs=2))
    for done in output.outputs:
        truth.check_output(PROMPT, done, 2)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("wanted", [21, -1, VOCAB_SIZE])
def test_logprobs__more_than_max_logprobs_are_refused_before_anything_is_computed(llm: LLM, name: str, wanted: int) -> None:
    with recorded_steps(llm) as steps, pytest.raises(RequestValidationError, match=f"{name}={wanted}.*at most 20.*max_logprobs") as caught:
        llm.generate(["fine", PROMPT], [sampled(), sampled(**{name: wanted})], use_tqdm=False)
    assert (caught.value.parameter, caught.value.value, steps) == (name, wanted, [])
    assert_idle(llm)


@pytest.mark.parametrize("max_logprobs", [-1, VOCAB_SIZE, 10**6])
def test_logprobs__minus_one_is_the_whole_vocabulary_where_the_engine_gives_that_many(checkpoint: Path, truth: Truth, max_logprobs: int) -> None:
    with LLM(str(checkpoint), dtype="float32", max_logprobs=max_logprobs) as llm:
        (output,) = run(llm, [PROMPT], sampled(logprobs=-1, prompt_logprobs=-1, max_tokens=3))
    truth.check_output(PROMPT, output.outputs[0], VOCAB_SIZE)
    truth.check_prompt(PROMPT, output, VOCAB_SIZE)
    assert all(len(c) == VOCAB_SIZE for c in output.outputs[0].logprobs)


def test_logprobs__survive_a_preemption(llm: LLM, truth: Truth) -> None:
    prompts, params = [LONG[:40], PROMPT], sampled(logprobs=3, prompt_logprobs=2, max_tokens=20)
    running, call, count = llm.llm_engine, Call(), 0
    running.submit(call, prompts, [params, params], [0, 0])
    sequences = [s.request for live in call.pending.values() for s in live.sequences]
    while running.has_work:
        count += 1
        if count in (3, 7, 15):
            assert all(running.engine.scheduler.preempt(s.sequence_id) for s in sequences)
        running.step()
    for place, output in call.take():
        assert output.metrics.num_preemptions == 3
        truth.check_output(prompts[place], output.outputs[0], 3)
        truth.check_prompt(prompts[place], output, 2)
    assert_idle(llm)


# -- prompt_logprobs

def test_prompt_logprobs__none_leaves_them_out(llm: LLM) -> None:
    assert run(llm, [PROMPT], sampled())[0].prompt_logprobs is None


@pytest.mark.parametrize("wanted", [0, 1, 20])
@pytest.mark.parametrize("prompt", [[9], PROMPT, LONG[:64], LONG[:65], LONG], ids=len)
def test_prompt_logprobs__of_every_prompt_token_but_the_first(llm: LLM, truth: Truth, wanted: int, prompt: list[int]) -> None:
    (output,) = run(llm, [prompt], sampled(prompt_logprobs=wanted, max_tokens=2))
    truth.check_prompt(prompt, output, wanted)
    assert output.outputs[0].logprobs is None


def test_prompt_logprobs__texts_are_those_of_the_tokens_alone(llm: LLM) -> None:
    (output,) = run(llm, "ab", sampled(prompt_logprobs=3, max_tokens=1))
    assert [c[t].decoded_token for c, t in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)] == ["a", "b"]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prompt_logprobs__over_several_steps(checkpoint: Path, truth: Truth, chunk: int) -> None:
    with LLM(str(checkpoint), dtype="float32", long_prefill_token_threshold=chunk) as llm, recorded_steps(llm) as steps:
        outputs = run(llm, [LONG, LONG[3:80]], [sampled(prompt_logprobs=2, logprobs=1), sampled()])
        assert max(r.num_tokens for step in steps for r in step.ranges) == chunk
    truth.check_prompt(LONG, outputs[0], 2)
    truth.check_output(LONG, outputs[0].outputs[0], 1)


def test_prompt_logprobs__with_a_step_that_is_smaller_than_the_prompts(checkpoint: Path, truth: Truth) -> None:
    with LLM(str(checkpoint), dtype="float32", max_num_batched_tokens=50, max_num_seqs=4, max_model_len=200) as llm:
        prompts = [LONG, LONG[:70], PROMPT]
        for prompt, output in zip(prompts, run(llm, prompts, sampled(prompt_logprobs=2)), strict=True):
            truth.check_prompt(prompt, output, 2)


def test_prompt_logprobs__a_warm_cache_is_not_read_but_written(checkpoint: Path, truth: Truth) -> None:
    with LLM(str(checkpoint), dtype="float32") as llm:
        assert run(llm, [LONG], sampled())[0].num_cached_tokens == 0
        assert run(llm, [LONG], sampled())[0].num_cached_tokens == 144
        with recorded_steps(llm) as steps:
            (output,) = run(llm, [LONG], sampled(prompt_logprobs=2))
        assert output.num_cached_tokens == 0
        assert computed_of_prompts(steps, len(LONG)) == len(LONG)
        truth.check_prompt(LONG, output, 2)
        assert llm.reset_prefix_cache()
        run(llm, [LONG], sampled(prompt_logprobs=2))
        assert run(llm, [LONG], sampled())[0].num_cached_tokens == 144


@pytest.mark.parametrize("caching", [True, False])
def test_prompt_logprobs__once_for_all_samples_which_still_share_the_prompt(checkpoint: Path, truth: Truth, caching: bool) -> None:
    with LLM(str(checkpoint), dtype="float32", enable_prefix_caching=caching) as llm:
        for _ in range(2):
            with recorded_steps(llm) as steps:
                (output,) = run(llm, [LONG], sampled(n=3, prompt_logprobs=2, logprobs=1))
            assert computed_of_prompts(steps, len(LONG)) == len(LONG) + 2 * (len(LONG) - 144)
            truth.check_prompt(LONG, output, 2)
            for done in output.outputs:
                truth.check_output(LONG, done, 1)


def test_prompt_logprobs__survive_a_preemption_in_the_middle_of_the_prompt(checkpoint: Path, truth: Truth) -> None:
    with LLM(str(checkpoint), dtype="float32", long_prefill_token_threshold=20) as llm:
        running, call, count = llm.llm_engine, Call(), 0
        running.submit(call, [LONG], [sampled(prompt_logprobs=2, logprobs=1)], [0])
        (live,) = call.pending.values()
        while running.has_work:
            count += 1
            if count in (4, 9, 20):
                assert running.engine.scheduler.preempt(live.sequences[0].request.sequence_id)
            running.step()
        ((_, output),) = call.take()
        assert output.metrics.num_preemptions == 3
    truth.check_prompt(LONG, output, 2)
    truth.check_output(LONG, output.outputs[0], 1)


def test_prompt_logprobs__of_what_is_left_of_a_truncated_prompt(llm: LLM, truth: Truth) -> None:
    (output,) = run(llm, [LONG], sampled(prompt_logprobs=1, truncate_prompt_tokens=30))
    truth.check_prompt(LONG[-30:], output, 1)
