"""Every field of what a request gives back."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from api_helpers import Truth, run, writes, written

from kvloom import LLM, BeamSearchParams, CompletionOutput, Logprob, RequestMetrics, RequestOutput, SamplingParams
from kvloom.beam_outputs import BeamSearchOutput, BeamSearchSequence
from kvloom.errors import RequestFailedError, RequestValidationError
from kvloom.live_request import Call
from kvloom.pooling_outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from kvloom.testing.checkpoints import BOS, EOS

PROMPT = [(7 * i) % 250 for i in range(50)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32") as made:
        yield made


def greedy(**params) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, "ignore_eos": True} | params)


ROWS = {
    "request_output": [*(f.name for f in fields(RequestOutput)), "add"],
    "completion_output": [*(f.name for f in fields(CompletionOutput)), "finished"],
    "logprob": [f.name for f in fields(Logprob)],
    "pooling_output": ["data", "embedding"],
    "pooling_request_output": ["request_id", "outputs", "prompt_token_ids", "finished", "num_cached_tokens", "error", "metrics"],
    "embedding_output": ["embedding", "hidden_size"], "classification_output": ["probs", "num_classes"], "scoring_output": ["score", "embedding"],
    "beam_search_output": ["sequences", "error"], "beam_search_sequence": [f.name for f in fields(BeamSearchSequence)],
}


def test_every_field_has_a_test_by_its_name() -> None:
    names = set(re.findall(r"def test_(\w+?)__", Path(__file__).read_text()))
    assert {f"{owner}_{field}" for owner, names_of_it in ROWS.items() for field in names_of_it} <= names


# -- RequestOutput

def test_request_output_request_id__texts_that_count_up_from_0_over_the_life_of_the_llm(checkpoint: Path) -> None:
    with LLM(str(checkpoint), dtype="float32") as llm:
        found = [o.request_id for prompts in (["a", "b"], ["c"], [], ["d", "e"]) for o in run(llm, prompts, GREEDY)]
    assert found == ["0", "1", "2", "3", "4"]


def test_request_output_request_id__one_for_all_samples(llm: LLM) -> None:
    first, second = run(llm, ["a", "b"], SamplingParams(n=3, max_tokens=1))
    assert int(second.request_id) == int(first.request_id) + 1


def test_request_output_prompt__its_text_or_none_for_token_prompts(llm: LLM) -> None:
    outputs = run(llm, ["é", {"prompt": "b"}, [1], {"prompt_token_ids": [1]}, {"prompt_token_ids": [1], "prompt": "known"}], GREEDY)
    assert [o.prompt for o in outputs] == ["é", "b", None, None, "known"]


def test_request_output_prompt_token_ids__as_computed_with_what_the_tokenizer_added(llm: LLM) -> None:
    given = [1, 2, 3]
    text, tokens = run(llm, ["ab", given], GREEDY)
    assert text.prompt_token_ids == [BOS, *b"ab"]
    assert tokens.prompt_token_ids == given
    tokens.prompt_token_ids.append(4)
    assert given == [1, 2, 3]


def test_request_output_prompt_logprobs__as_long_as_the_prompt_beginning_with_none(llm: LLM, truth: Truth) -> None:
    plain, asked = run(llm, [PROMPT, PROMPT], [GREEDY, greedy(prompt_logprobs=2)])
    assert plain.prompt_logprobs is None
    truth.check_prompt(PROMPT, asked, 2)


def test_request_output_outputs__n_of_them(llm: LLM) -> None:
    one, three = run(llm, ["a", "b"], [GREEDY, SamplingParams(n=3, max_tokens=2)])
    assert (len(one.outputs), len(three.outputs)) == (1, 3)
    assert all(isinstance(o, CompletionOutput) for o in three.outputs)


def test_request_output_finished__true_for_all_that_generate_returns(llm: LLM) -> None:
    outputs = run(llm, ["a", [10**6], PROMPT], GREEDY, on_error="return")
    assert [o.finished for o in outputs] == [True] * 3
    assert [o.error is None for o in outputs] == [True, False, True]


def test_request_output_metrics__times_in_order_and_what_was_generated(llm: LLM) -> None:
    before = time.monotonic()
    (output,) = run(llm, ["abc"], greedy(max_tokens=5))
    m = output.metrics
    assert isinstance(m, RequestMetrics)
    assert before <= m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.last_token_time <= m.finished_time <= time.monotonic()
    assert m.time_in_queue == m.first_scheduled_time - m.arrival_time
    assert m.time_in_prefill == m.first_token_time - m.first_scheduled_time
    assert m.first_token_latency == m.first_token_time - m.arrival_time
    assert (m.num_generation_tokens, m.num_preemptions, m.num_recomputed_tokens) == (5, 0, 0)


def test_request_output_metrics__of_all_samples_together(llm: LLM) -> None:
    (output,) = run(llm, ["abc"], SamplingParams(n=4, seed=1, max_tokens=9, stop_token_ids=list(range(100))))
    lengths = [len(o.token_ids) for o in output.outputs]
    assert len(set(lengths)) > 1
    assert output.metrics.num_generation_tokens == sum(lengths)
    assert output.metrics.first_token_time < output.metrics.last_token_time <= output.metrics.finished_time


def test_request_output_metrics__preemptions_and_what_was_computed_again(checkpoint: Path) -> None:
    with LLM(str(checkpoint), dtype="float32", enable_prefix_caching=False) as llm:
        running, call = llm.llm_engine, Call()
        running.submit(call, [PROMPT], [greedy(max_tokens=8)], [0])
        (live,) = call.pending.values()
        count = 0
        while running.has_work:
            count += 1
            if count in (3, 6):
                assert running.engine.scheduler.preempt(live.sequences[0].request.sequence_id)
            running.step()
        ((_, output),) = call.take()
    m = output.metrics
    assert (m.num_preemptions, m.num_recomputed_tokens) == (2, (50 + 1) + (50 + 4))


def test_request_output_metrics__waiting_counts_as_time_in_the_queue(checkpoint: Path) -> None:
    with LLM(str(checkpoint), dtype="float32", max_num_seqs=1) as llm:
        first, second = run(llm, ["a", "b"], greedy(max_tokens=20))
    assert second.metrics.first_scheduled_time >= first.metrics.last_token_time
    assert second.metrics.time_in_queue > first.metrics.time_in_queue


@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
@pytest.mark.parametrize("prompt_tokens", [32, 33, 50])
def test_request_output_num_cached_tokens__whole_blocks_but_never_the_last_token(checkpoint: Path, block_size: int, prompt_tokens: int) -> None:
    prompt = PROMPT[:prompt_tokens]
    with LLM(str(checkpoint), dtype="float32", block_size=block_size) as llm:
        cold, warm = (run(llm, [prompt], greedy(max_tokens=1))[0] for _ in range(2))
        assert cold.num_cached_tokens == 0
        assert warm.num_cached_tokens == warm.metrics.num_cached_tokens == (prompt_tokens - 1) // block_size * block_size
        (longer,) = run(llm, [[*prompt, 1, 2, 3]], greedy(max_tokens=1))
        assert longer.num_cached_tokens == prompt_tokens // block_size * block_size


def test_request_output_num_cached_tokens__nothing_where_caching_is_off_or_the_salt_differs(checkpoint: Path, llm: LLM) -> None:
    with LLM(str(checkpoint), dtype="float32", enable_prefix_caching=False) as off:
        assert [run(off, [PROMPT], GREEDY)[0].num_cached_tokens for _ in range(2)] == [0, 0]
    salted = [{"prompt_token_ids": PROMPT, "cache_salt": salt} for salt in ("x", "y", "x")]
    assert [run(llm, [p], GREEDY)[0].num_cached_tokens for p in salted] == [0, 0, 48]


def test_request_output_lora_request__none_so_far(llm: LLM) -> None:
    assert run(llm, "a", GREEDY)[0].lora_request is None


def test_request_output_encoder_prompt__none_for_decoder_only_models(llm: LLM) -> None:
    assert run(llm, "a", GREEDY)[0].encoder_prompt is None


def test_request_output_encoder_prompt_token_ids__none_for_decoder_only_models(llm: LLM) -> None:
    assert run(llm, "a", GREEDY)[0].encoder_prompt_token_ids is None


def test_request_output_multi_modal_placeholders__an_empty_dictionary_of_its_own(llm: LLM) -> None:
    a, b = run(llm, ["a", "b"], GREEDY)
    assert a.multi_modal_placeholders == b.multi_modal_placeholders == {}
    assert a.multi_modal_placeholders is not b.multi_modal_placeholders


def test_request_output_error__none_when_nothing_failed(llm: LLM) -> None:
    assert run(llm, "a", GREEDY)[0].error is None
    assert run(llm, "a", GREEDY, on_error="return")[0].error is None


def test_request_output_error__why_a_request_was_refused_in_its_place(llm: LLM) -> None:
    good, bad, tail = run(llm, ["a", [10**6], "b"], GREEDY, on_error="return")
    assert isinstance(bad.error, RequestValidationError)
    assert (bad.outputs, bad.finished, bad.prompt_logprobs) == ([], True, None)
    assert int(bad.request_id) == int(good.request_id) + 1 == int(tail.request_id) - 1
    assert bad.metrics.finished_time is not None


def test_request_output_error__a_request_that_failed_keeps_what_there_was(llm: LLM) -> None:
    def fails_at_three(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output_ids) == 3:
            raise ArithmeticError
        return writes("abcdef")(output_ids, logits)

    (output,) = run(llm, ["x"], greedy(logits_processors=[fails_at_three], logprobs=1), on_error="return")
    assert isinstance(output.error, RequestFailedError)
    (done,) = output.outputs
    assert (done.text, list(done.token_ids), done.finish_reason) == ("abc", list(b"abc"), "error")
    assert len(done.logprobs) == 3


METRICS = [RequestMetrics(float(i)) for i in range(3)]


def part(*completions: CompletionOutput, finished: bool = False, metrics: RequestMetrics = METRICS[0]) -> RequestOutput:
    return RequestOutput("0", "p", [1], None, list(completions), finished, metrics)


def test_request_output_add__aggregated_completions_of_the_same_index_grow() -> None:
    whole = part(CompletionOutput(0, "a", [1], -1.0, [{1: Logprob(-1.0)}]), CompletionOutput(1, "x", [7]))
    whole.add(part(CompletionOutput(1, "y", [8], finish_reason="length"), metrics=METRICS[1]))
    whole.add(part(CompletionOutput(0, "b", (2, 3), -3.0, [{2: Logprob(-1.0)}, {3: Logprob(-1.0)}], "stop", "b"), CompletionOutput(2, "new", [9]),
                   finished=True, metrics=METRICS[2]))
    a, b, c = whole.outputs
    assert (a.text, list(a.token_ids), a.cumulative_logprob, [next(iter(p)) for p in a.logprobs]) == ("ab", [1, 2, 3], -3.0, [1, 2, 3])
    assert (a.finish_reason, a.stop_reason) == ("stop", "b")
    assert (b.text, list(b.token_ids), b.logprobs, b.finish_reason) == ("xy", [7, 8], None, "length")
    assert (c.index, c.text) == (2, "new")
    assert whole.finished
    assert whole.metrics is METRICS[2]


def test_request_output_add__without_aggregation_they_are_replaced() -> None:
    whole = part(CompletionOutput(0, "a", [1]), CompletionOutput(1, "x", [7]))
    later = CompletionOutput(1, "xyz", [7, 8, 9])
    whole.add(part(later), aggregate=False)
    assert [o.text for o in whole.outputs] == ["a", "xyz"]
    assert whole.outputs[1] is later
    assert not whole.finished


def test_request_output_add__an_output_that_was_finished_stays_so_and_an_error_too() -> None:
    whole, failed = part(finished=True), part()
    failed.error = RequestFailedError("lost")
    whole.add(failed)
    whole.add(part())
    assert whole.finished
    assert whole.error is failed.error


def test_request_output_add__does_not_change_what_is_added() -> None:
    whole, delta = part(CompletionOutput(0, "a", [1])), part(CompletionOutput(0, "b", [2]))
    whole.add(delta)
    whole.add(delta)
    assert (whole.outputs[0].text, list(whole.outputs[0].token_ids)) == ("abb", [1, 2, 2])
    assert (delta.outputs[0].text, delta.outputs[0].token_ids) == ("b", [2])


# -- CompletionOutput

def test_completion_output_index__counts_the_samples(llm: LLM) -> None:
    (output,) = run(llm, "a", SamplingParams(n=4, max_tokens=2))
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]


def test_completion_output_text__the_outputs_alone_as_it_continues_the_prompt(llm: LLM) -> None:
    assert written(llm, "née", prompt="il est ").text == "née"
    assert written(llm, [0xA9, ord("x")], prompt=[ord("a"), 0xC3]).text.endswith("x"), "the output completes the prompt's last character"


def test_completion_output_token_ids__without_the_prompt_and_with_the_stop_token(llm: LLM) -> None:
    done = written(llm, "ab", prompt="xyz")
    assert list(done.token_ids) == [*b"ab", EOS]


def test_completion_output_cumulative_logprob__the_sum_of_the_sampled_tokens(llm: LLM) -> None:
    plain, asked = run(llm, ["a", "a"], [GREEDY, greedy(logprobs=0)])
    (done,) = asked.outputs
    assert plain.outputs[0].cumulative_logprob is None
    assert done.cumulative_logprob == pytest.approx(sum(c[t].logprob for c, t in zip(done.logprobs, done.token_ids, strict=True)))


def test_completion_output_logprobs__one_dictionary_a_token_or_none(llm: LLM, truth: Truth) -> None:
    plain, asked = run(llm, [PROMPT] * 2, [GREEDY, greedy(logprobs=3)])
    assert plain.outputs[0].logprobs is None
    assert [type(c) for c in asked.outputs[0].logprobs] == [dict] * 6
    truth.check_output(PROMPT, asked.outputs[0], 3)


def test_completion_output_finish_reason__stop_length_or_error(llm: LLM) -> None:
    assert written(llm, "ab").finish_reason == "stop"
    assert written(llm, "ab", stop="b").finish_reason == "stop"
    assert written(llm, "ab", stop_token_ids=[ord("b")]).finish_reason == "stop"
    assert written(llm, "ab", max_tokens=1).finish_reason == "length"
    (output,) = run(llm, "a", greedy(logits_processors=[lambda output_ids, logits: None]), on_error="return")
    assert output.outputs[0].finish_reason == "error"


def test_completion_output_stop_reason__the_text_the_id_or_none_for_end_of_text(llm: LLM) -> None:
    assert written(llm, "ab", stop="b").stop_reason == "b"
    assert written(llm, "ab", stop_token_ids=[ord("b")]).stop_reason == ord("b")
    assert written(llm, "ab").stop_reason is None
    assert written(llm, "ab", max_tokens=1).stop_reason is None


def test_completion_output_lora_request__none_so_far(llm: LLM) -> None:
    assert run(llm, "a", GREEDY)[0].outputs[0].lora_request is None


def test_completion_output_finished__whether_there_is_a_reason(llm: LLM) -> None:
    assert run(llm, "a", GREEDY)[0].outputs[0].finished()
    assert not CompletionOutput(0, "", []).finished()
    assert CompletionOutput(0, "", [], finish_reason="abort").finished()


# -- Logprob

def test_logprob_logprob__natural_logarithm_of_the_models_probability(llm: LLM, truth: Truth) -> None:
    (output,) = run(llm, [PROMPT], greedy(logprobs=4, max_tokens=1, temperature=0))
    expected = truth.after(PROMPT).softmax(-1)
    for token_id, candidate in output.outputs[0].logprobs[0].items():
        assert candidate.logprob == pytest.approx(expected[token_id].log().item(), abs=1e-4)
        assert type(candidate.logprob) is float


def test_logprob_rank__one_is_the_best(llm: LLM) -> None:
    (output,) = run(llm, [PROMPT], SamplingParams(seed=1, max_tokens=6, ignore_eos=True, logprobs=4))
    for candidates in output.outputs[0].logprobs:
        by_rank = sorted(candidates.values(), key=lambda c: c.rank)
        assert [c.rank for c in by_rank[:4]] == [1, 2, 3, 4]
        assert [c.logprob for c in by_rank] == sorted((c.logprob for c in by_rank), reverse=True)
        assert all(type(c.rank) is int and c.rank >= 1 for c in by_rank)


def test_logprob_decoded_token__its_text_special_tokens_too(llm: LLM) -> None:
    (output,) = run(llm, "é", greedy(max_tokens=2, logprobs=0, prompt_logprobs=0, logits_processors=[writes([ord("x"), EOS])]))
    assert [next(iter(c.values())).decoded_token for c in output.outputs[0].logprobs] == ["x", "</s>"]
    assert [next(iter(c.values())).decoded_token for c in output.prompt_logprobs[1:]] == ["\ufffd", "\ufffd"]


# -- pooling

VECTOR = torch.tensor([0.6, -0.8])


def test_pooling_output_data__equal_where_shape_and_all_numbers_are() -> None:
    assert PoolingOutput(VECTOR) == PoolingOutput(VECTOR.clone())
    assert PoolingOutput(VECTOR).data is VECTOR
    for other in (torch.tensor([0.6, -0.7]), torch.tensor([0.6]), VECTOR[None], torch.tensor(0.6)):
        assert PoolingOutput(VECTOR) != PoolingOutput(other)
    assert PoolingOutput(VECTOR) != VECTOR.tolist()
    assert PoolingOutput(torch.tensor([float("nan")])) != PoolingOutput(torch.tensor([float("nan")]))
    with pytest.raises(TypeError, match="unhashable"):
        hash(PoolingOutput(VECTOR))


def test_pooling_output_data__may_be_an_array_of_another_library() -> None:
    assert PoolingOutput(VECTOR.numpy()) == PoolingOutput(VECTOR)
    assert EmbeddingOutput.from_base(PoolingOutput(VECTOR.numpy())) == EmbeddingOutput.from_base(PoolingOutput(VECTOR))


def test_pooling_output_embedding__is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="data") as caught:
        assert PoolingOutput(VECTOR).embedding == VECTOR.tolist()
    assert caught[0].filename == __file__


def pooled(data: torch.Tensor) -> PoolingRequestOutput[PoolingOutput]:
    return PoolingRequestOutput("7", PoolingOutput(data), [1, 2], True, 16)


REQUEST_OUTPUTS = [(EmbeddingRequestOutput, EmbeddingOutput, VECTOR), (ClassificationRequestOutput, ClassificationOutput, torch.tensor([0.25, 0.75])),
                   (ScoringRequestOutput, ScoringOutput, torch.tensor(0.5))]


def test_pooling_request_output_request_id__is_the_first_argument() -> None:
    assert pooled(VECTOR).request_id == "7"
    assert repr(pooled(VECTOR)).startswith("PoolingRequestOutput(request_id='7', outputs=PoolingOutput(data=tensor(")


@pytest.mark.parametrize(("request_output", "output", "data"), REQUEST_OUTPUTS)
def test_pooling_request_output_outputs__become_those_of_the_task(request_output, output, data: torch.Tensor) -> None:
    base = pooled(data)
    found = request_output.from_base(base)
    assert type(found) is request_output
    assert isinstance(found, PoolingRequestOutput)
    assert found.outputs == output.from_base(PoolingOutput(data))
    assert isinstance(base.outputs, PoolingOutput)


@pytest.mark.parametrize(("request_output", "output", "data"), REQUEST_OUTPUTS)
def test_pooling_request_output_prompt_token_ids__are_taken_over(request_output, output, data: torch.Tensor) -> None:
    found = request_output.from_base(pooled(data))
    assert (found.request_id, found.prompt_token_ids) == ("7", [1, 2])


@pytest.mark.parametrize(("request_output", "output", "data"), REQUEST_OUTPUTS)
def test_pooling_request_output_finished__is_taken_over(request_output, output, data: torch.Tensor) -> None:
    assert request_output.from_base(pooled(data)).finished is True


@pytest.mark.parametrize(("request_output", "output", "data"), REQUEST_OUTPUTS)
def test_pooling_request_output_num_cached_tokens__is_taken_over(request_output, output, data: torch.Tensor) -> None:
    assert request_output.from_base(pooled(data)).num_cached_tokens == 16
    assert PoolingRequestOutput("0", PoolingOutput(data), [1], True).num_cached_tokens == 0


@pytest.mark.parametrize(("request_output", "output", "data"), REQUEST_OUTPUTS)
def test_pooling_request_output_error__is_taken_over(request_output, output, data: torch.Tensor) -> None:
    base, error = pooled(data), RequestFailedError("lost")
    assert base.error is None
    base.error = error
    assert request_output.from_base(base).error is error


@pytest.mark.parametrize(("request_output", "output", "data"), REQUEST_OUTPUTS)
def test_pooling_request_output_metrics__are_taken_over(request_output, output, data: torch.Tensor) -> None:
    base = pooled(data)
    base.metrics = RequestMetrics(1.0)
    assert request_output.from_base(base).metrics is base.metrics


def refuses(output, data: torch.Tensor, message: str) -> None:
    with pytest.raises(RequestValidationError, match=message) as caught:
        output.from_base(PoolingOutput(data))
    assert caught.value.parameter == "data"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("data", [torch.tensor(1.0), torch.ones(1, 3), torch.ones(2, 3, 1)], ids=lambda d: str(d.ndim))
def test_embedding_output_embedding__a_list_of_floats_from_one_axis_only(data: torch.Tensor) -> None:
    assert EmbeddingOutput.from_base(PoolingOutput(VECTOR)).embedding == VECTOR.tolist()
    refuses(EmbeddingOutput, data, "1-D")
    with pytest.raises(RequestValidationError):
        EmbeddingRequestOutput.from_base(pooled(data))


def test_embedding_output_hidden_size__its_length() -> None:
    assert EmbeddingOutput.from_base(PoolingOutput(torch.ones(5))).hidden_size == 5


@pytest.mark.parametrize("data", [torch.tensor(1.0), torch.ones(1, 3)], ids=lambda d: str(d.ndim))
def test_classification_output_probs__a_list_of_floats_from_one_axis_only(data: torch.Tensor) -> None:
    probs = torch.tensor([1.0, 2.0, 0.5]).softmax(-1)
    found = ClassificationOutput.from_base(PoolingOutput(probs)).probs
    assert found == probs.tolist()
    assert sum(found) == pytest.approx(1)
    refuses(ClassificationOutput, data, "1-D")


def test_classification_output_num_classes__their_number() -> None:
    assert ClassificationOutput.from_base(PoolingOutput(torch.ones(3))).num_classes == 3


@pytest.mark.parametrize("data", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])], ids=lambda d: str(d.ndim))
def test_scoring_output_score__one_number_in_any_number_of_axes(data: torch.Tensor) -> None:
    assert ScoringOutput.from_base(PoolingOutput(data)).score == 0.5
    for bad in (torch.ones(2), torch.ones(1, 2), torch.ones(0)):
        refuses(ScoringOutput, bad, "scalar score")


def test_scoring_output_embedding__is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="score"):
        assert ScoringOutput(0.5).embedding == [0.5]


def test_pooling_output_data__needs_no_torch() -> None:
    code = "import sys, kvloom.pooling_outputs, kvloom.beam_outputs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- beam search

BEAM = BeamSearchSequence([1, 2, 3], [{3: Logprob(-0.5)}])


def test_beam_search_output_sequences__as_given() -> None:
    assert BeamSearchOutput([BEAM]).sequences == [BEAM]


def test_beam_search_output_error__of_a_request_that_failed(llm: LLM) -> None:
    good, bad = llm.beam_search(["a", [10**6]], BeamSearchParams(2, 3), on_error="return")
    assert (good.error, len(good.sequences)) == (None, 2)
    assert isinstance(bad.error, RequestValidationError)
    assert bad.sequences == []


def test_beam_search_sequence_tokens__with_the_prompt() -> None:
    assert BEAM.tokens == [1, 2, 3]


def test_beam_search_sequence_logprobs__of_generated_tokens() -> None:
    assert BEAM.logprobs == [{3: Logprob(-0.5)}]


@pytest.mark.parametrize("missing", [(), ([1],)])
def test_beam_search_sequence_logprobs__are_required_as_tokens_are(missing: tuple) -> None:
    with pytest.raises(TypeError, match="missing"):
        BeamSearchSequence(*missing)


def test_beam_search_sequence_cum_logprob__begins_at_zero() -> None:
    assert BEAM.cum_logprob == 0.0


def test_beam_search_sequence_text__none_while_it_grows() -> None:
    assert BEAM.text is None


def test_beam_search_sequence_finish_reason__none_by_default() -> None:
    assert BEAM.finish_reason is None


def test_beam_search_sequence_stop_reason__none_by_default() -> None:
    assert BEAM.stop_reason is None


def test_beam_search_sequence_multi_modal_data__none_by_default() -> None:
    assert BEAM.multi_modal_data is None


def test_beam_search_sequence_mm_processor_kwargs__none_by_default() -> None:
    assert BEAM.mm_processor_kwargs is None


def test_beam_search_sequence_lora_request__none_by_default() -> None:
    assert BEAM.lora_request is None
