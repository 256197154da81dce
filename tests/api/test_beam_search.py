"""`LLM.beam_search` against transformers' beam search and against the algorithm written down once more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from api_helpers import Truth, assert_idle, recorded_steps

from kvloom import LLM, BeamSearchParams, BeamSearchSequence, SamplingParams
from kvloom.errors import RequestFailedError, RequestTypeError, RequestValidationError, UnsupportedFeatureError
from kvloom.testing.checkpoints import BOS, EOS

PROMPTS = [[1, 2, 3], [7] * 40, [5, 6], [(7 * i) % 250 for i in range(50)]]
NO_END = {"ignore_eos": True}
TOLERANCE = 1e-3
"""Of sums of up to 20 float32 log-probabilities."""


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), dtype="float32") as made:
        yield made


class Beam(NamedTuple):
    """A sequence of the plain search: tokens with the prompt, cumulative log-probability."""

    tokens: tuple[int, ...]
    total: float = 0.0


def plain_search(truth: Truth, prompt: list[int], params: BeamSearchParams, *, only_best_end: bool = False) -> list[Beam]:
    """Beam search over transformers' logits, every sequence computed from its beginning.

    Args:
        only_best_end: an end token only counts among the `beam_width` best candidates of a step, as in transformers.
    """
    def score(beam: Beam) -> float:
        return beam.total / (len(beam.tokens) - (beam.tokens[-1] == EOS)) ** params.length_penalty

    width, live, done = params.beam_width, [Beam(tuple(prompt))], []
    for _ in range(params.max_tokens):
        new: list[Beam] = []
        for beam in live:
            logits = truth.after(beam.tokens) / (params.temperature or 1)
            best = logits.log_softmax(-1).topk(2 * width)
            new += [Beam((*beam.tokens, i), beam.total + p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        new.sort(key=score, reverse=True)
        if not params.ignore_eos:
            done += [b for place, b in enumerate(new) if b.tokens[-1] == EOS and (place < width or not only_best_end)]
            new = [b for b in new if b.tokens[-1] != EOS]
        live = new[:width]
        if not live:
            break
    return sorted([*done, *live], key=score, reverse=True)[:width]


def check(found: list[BeamSearchSequence], expected: list[Beam]) -> None:
    assert [tuple(s.tokens) for s in found] == [b.tokens for b in expected]
    assert [s.cum_logprob for s in found] == pytest.approx([b.total for b in expected], abs=TOLERANCE)


def search(llm: LLM, prompts, *args, **params) -> list[list[BeamSearchSequence]]:
    """The sequences of each prompt; the engine is empty afterwards."""
    outputs = llm.beam_search(prompts, BeamSearchParams(*args, **params))
    assert_idle(llm)
    return [o.sequences for o in outputs]


# -- against others

def theirs(truth: Truth, prompt: list[int], width: int, max_tokens: int, eos: int | None) -> list[list[int]]:
    """transformers' sequences; without early stopping it goes on as long as a live one may still win."""
    out = truth._model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=width, num_return_sequences=width,
        length_penalty=0.0, early_stopping="never", do_sample=False, max_new_tokens=max_tokens, pad_token_id=0, eos_token_id=eos)
    return [row[:row.index(EOS, len(prompt)) + 1] if eos is not None and EOS in row[len(prompt):] else row for row in out.tolist()]


@pytest.mark.parametrize("width", [2, 4, 7])
def test_beam_search__beams_are_those_of_transformers(llm: LLM, truth: Truth, width: int) -> None:
    found = search(llm, PROMPTS, width, 12, length_penalty=0.0, **NO_END)
    truth._model.generation_config.eos_token_id = None
    assert [[s.tokens for s in sequences] for sequences in found] == [theirs(truth, p, width, 12, None) for p in PROMPTS]


def test_beam_search__ends_that_are_among_the_best_are_those_of_transformers(llm: LLM, truth: Truth) -> None:
    """transformers drops end tokens below the `width` best candidates of a step: where there are none, the sequences are equal."""
    prompts = [[i, 3 * i, 40 + i] for i in range(12)] + [[i] * 4 for i in range(14)]
    equal = ended = 0
    for width in (2, 3):
        params = BeamSearchParams(width, 6, length_penalty=0.0)
        for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
            expected = plain_search(truth, prompt, params, only_best_end=True)
            assert [list(b.tokens) for b in expected] == theirs(truth, prompt, width, 6, EOS)
            if expected == plain_search(truth, prompt, params):
                check(output.sequences, expected)
                equal += 1
                ended += any(b.tokens[-1] == EOS for b in expected)
    assert equal >= 20
    assert ended >= 1


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.7, 2.5])
def test_beam_search__beams_are_those_of_the_plain_search_with_ends(llm: LLM, truth: Truth, penalty: float) -> None:
    found = search(llm, PROMPTS, 4, 10, length_penalty=penalty)
    for prompt, sequences in zip(PROMPTS, found, strict=True):
        check(sequences, plain_search(truth, prompt, BeamSearchParams(4, 10, length_penalty=penalty)))


@pytest.mark.parametrize("values", [
    {"max_num_seqs": 4}, {"enable_prefix_caching": False}, {"max_num_batched_tokens": 7, "max_num_seqs": 7}, {"num_gpu_blocks_override": 19, "block_size": 8},
    {"block_size": 1},
], ids=str)
def test_beam_search__beams_do_not_depend_on_how_they_are_scheduled(llm: LLM, checkpoint: Path, values: dict) -> None:
    expected = search(llm, PROMPTS, 4, 12, **NO_END)
    with LLM(str(checkpoint), dtype="float32", max_model_len=64, **values) as other:
        found = search(other, PROMPTS, 4, 12, **NO_END)
    assert [[s.tokens for s in sequences] for sequences in found] == [[s.tokens for s in sequences] for sequences in expected]


# -- parameters

def test_every_field_has_a_test_by_its_name() -> None:
    names = re.findall(r"def test_beam_search_params_(\w+?)__", Path(__file__).read_text())
    assert {f.name for f in fields(BeamSearchParams)} <= set(names)


@pytest.mark.parametrize("width", [1, 3, 10])
def test_beam_search_params_beam_width__so_many_sequences_best_first(llm: LLM, width: int) -> None:
    (sequences,) = search(llm, [[1, 2]], width, 5)
    assert len(sequences) == width
    scores = [s.cum_logprob / (len(s.tokens) - (s.tokens[-1] == EOS)) for s in sequences]
    assert scores == sorted(scores, reverse=True)


def test_beam_search_params_beam_width__one_is_greedy(llm: LLM) -> None:
    (sequences,) = search(llm, [[1, 2]], 1, 12, **NO_END)
    (output,) = llm.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    assert sequences[0].tokens == [1, 2, *output.outputs[0].token_ids]


def test_beam_search_params_beam_width__is_bounded_by_max_logprobs_and_max_num_seqs(llm: LLM, checkpoint: Path) -> None:
    with pytest.raises(RequestValidationError, match="needs 22 candidates.*at most 20: raise max_logprobs") as caught:
        search(llm, ["a"], 11, 5)
    assert caught.value.parameter == "beam_width"
    assert_idle(llm)
    with LLM(str(checkpoint), dtype="float32", max_logprobs=-1, max_num_seqs=12) as wide:
        assert len(search(wide, ["a"], 12, 3)[0]) == 12
        with pytest.raises(RequestValidationError, match="max_num_seqs is 12"):
            search(wide, ["a"], 13, 3)


def test_beam_search_params_max_tokens__bounds_every_beam_and_so_does_the_models_length(llm: LLM, checkpoint: Path) -> None:
    (sequences,) = search(llm, [[1, 2]], 3, 7, **NO_END)
    assert [len(s.tokens) for s in sequences] == [9] * 3
    with LLM(str(checkpoint), dtype="float32", max_model_len=12) as short:
        (sequences,) = search(short, [[1] * 8], 3, 50, **NO_END)
        assert [len(s.tokens) for s in sequences] == [12] * 3


def test_beam_search_params_ignore_eos__an_end_token_is_one_like_others(llm: LLM) -> None:
    (heeding,), (ignoring,) = (search(llm, [[7] * 4], 10, 6, length_penalty=-2.0, ignore_eos=i) for i in (False, True))
    assert any(s.tokens[-1] == EOS and len(s.tokens) < 10 for s in heeding)
    assert all(len(s.tokens) == 10 for s in ignoring)


def test_beam_search_params_temperature__divides_the_logits(llm: LLM, truth: Truth) -> None:
    plain, cold, hot = (search(llm, PROMPTS[:2], 3, 8, temperature=t, **NO_END) for t in (0.0, 0.5, 1.7))
    assert search(llm, PROMPTS[:2], 3, 8, temperature=1.0, **NO_END) == plain
    for temperature, found in ((0.5, cold), (1.7, hot)):
        for prompt, sequences in zip(PROMPTS[:2], found, strict=True):
            check(sequences, plain_search(truth, prompt, BeamSearchParams(3, 8, temperature=temperature, **NO_END)))
    assert cold[0][0].cum_logprob > plain[0][0].cum_logprob > hot[0][0].cum_logprob


def test_beam_search_params_length_penalty__large_ones_prefer_long_sequences(llm: LLM) -> None:
    (short,), (long,) = (search(llm, [[7] * 4], 8, 12, length_penalty=p) for p in (-2.0, 8.0))
    assert sum(len(s.tokens) for s in short) < sum(len(s.tokens) for s in long)


def test_beam_search_params_include_stop_str_in_output__keeps_the_end_tokens_text(llm: LLM) -> None:
    (without,), (having,) = (search(llm, [[7] * 4], 8, 12, length_penalty=-2.0, include_stop_str_in_output=i) for i in (False, True))
    ended = [i for i, s in enumerate(without) if s.tokens[-1] == EOS]
    assert ended
    for i, (a, b) in enumerate(zip(without, having, strict=True)):
        assert a.tokens == b.tokens
        assert b.text == a.text + ("</s>" if i in ended else "")


def test_beam_search_params_skip_special_tokens__leaves_them_out_of_the_text(llm: LLM) -> None:
    (without,), (having,) = (search(llm, ["ab"], 2, 3, skip_special_tokens=s, **NO_END) for s in (True, False))
    assert without[0].tokens[:3] == [BOS, *b"ab"]
    assert without[0].text.startswith("ab")
    assert having[0].text.startswith("<s>ab")


@pytest.mark.parametrize("wrong", [
    {"beam_width": 0}, {"beam_width": True}, {"beam_width": 2.0}, {"max_tokens": 0}, {"max_tokens": None}, {"temperature": -1.0},
    {"temperature": float("nan")}, {"temperature": 0.001}, {"length_penalty": float("inf")}, {"length_penalty": "1"}, {"ignore_eos": 1},
    {"include_stop_str_in_output": None}, {"skip_special_tokens": 0}, {"beam_width": 10**6},
], ids=str)
def test_beam_search__wrong_values_are_refused_at_construction_and_at_admission(llm: LLM, wrong: dict) -> None:
    with pytest.raises(RequestValidationError) as caught:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3} | wrong)
    (name,) = wrong
    assert caught.value.parameter == name
    changed = BeamSearchParams(2, 3)
    setattr(changed, *next(iter(wrong.items())))
    with pytest.raises(RequestValidationError):
        llm.beam_search(["a"], changed)
    assert_idle(llm)


@pytest.mark.parametrize("wrong", [SamplingParams(), None, {"beam_width": 2, "max_tokens": 3}], ids=["sampling", "none", "dict"])
@pytest.mark.parametrize("prompts", [[], ["a"]], ids=["no prompts", "a prompt"])
def test_beam_search__other_parameters_are_refused_with_and_without_prompts(llm: LLM, prompts: list, wrong: object) -> None:
    for on_error in ("raise", "return"):
        with pytest.raises(RequestTypeError, match="params must be BeamSearchParams"):
            llm.beam_search(prompts, wrong, on_error=on_error)
    changed = BeamSearchParams(2, 3)
    changed.beam_width = 0
    with pytest.raises(RequestValidationError, match="beam_width"):
        llm.beam_search(prompts, changed)
    assert_idle(llm)


@pytest.mark.parametrize("args", [(), (2,), (2, 3, False, 0.0, 1.0, False, True, 1)])
def test_beam_search__missing_and_surplus_arguments_are_type_errors(args: tuple) -> None:
    with pytest.raises(TypeError):
        BeamSearchParams(*args)


# -- the call

def test_beam_search__prompts_may_have_every_form(llm: LLM) -> None:
    params = BeamSearchParams(2, 4, **NO_END)
    ids = [BOS, *b"ab"]
    forms = ["ab", ["ab"], {"prompt": "ab"}, ids, [ids], {"prompt_token_ids": ids}]
    results = [llm.beam_search(form, params) for form in forms]
    assert all(r == results[0] for r in results)
    assert llm.beam_search([], params) == []


def test_beam_search__a_sequence_has_its_prompt_its_candidates_and_its_text(llm: LLM) -> None:
    (sequences,) = search(llm, ["ab"], 3, 4, **NO_END)
    for s in sequences:
        assert (s.finish_reason, s.stop_reason) == (None, None)
        generated = s.tokens[3:]
        assert [len(c) for c in s.logprobs] == [6] * 4
        assert sum(c[t].logprob for c, t in zip(s.logprobs, generated, strict=True)) == pytest.approx(s.cum_logprob)
        assert s.text == llm.get_tokenizer().decode(s.tokens, skip_special_tokens=True)


def test_beam_search__without_a_tokenizer_the_text_is_empty(checkpoint: Path) -> None:
    with LLM(str(checkpoint), dtype="float32", skip_tokenizer_init=True) as bare:
        (sequences,) = search(bare, [[1, 2]], 2, 4)
        assert [s.text for s in sequences] == ["", ""]
        with pytest.raises(RequestValidationError, match="skip_tokenizer_init"):
            search(bare, ["a"], 2, 4)


def test_beam_search__the_callers_parameters_are_not_changed(llm: LLM) -> None:
    params = BeamSearchParams(2, 4)
    llm.beam_search(["a"], params)
    assert params == BeamSearchParams(2, 4)


def test_beam_search__all_beams_of_all_prompts_advance_in_one_step_and_no_prompt_is_computed_again(llm: LLM) -> None:
    prompts = [[100 + i] * 33 for i in range(4)]
    with recorded_steps(llm) as steps:
        search(llm, prompts, 4, 6, **NO_END)
    assert [len(s.ranges) for s in steps] == [4, *[16] * 5]
    assert [s.num_tokens for s in steps] == [4 * 33, *[16] * 5]


def test_beam_search__concurrency_limit_bounds_prompts_under_way(llm: LLM) -> None:
    prompts = [[50 + i, 1] for i in range(5)]
    everything = search(llm, prompts, 2, 4, **NO_END)
    with recorded_steps(llm) as steps:
        limited = llm.beam_search(prompts, BeamSearchParams(2, 4, **NO_END), concurrency_limit=2)
    assert [[s.tokens for s in o.sequences] for o in limited] == [[s.tokens for s in o] for o in everything]
    assert max(len(s.ranges) for s in steps) == 4
    for wrong in (0, True, "2"):
        with pytest.raises(RequestValidationError) as caught:
            llm.beam_search(prompts, BeamSearchParams(2, 4), concurrency_limit=wrong)
        assert caught.value.parameter == "concurrency_limit"


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("bad", [[10**6], [1] * 600, "", {"prompt_token_ids": []}, 7], ids=str)
def test_beam_search__a_bad_prompt_is_refused_before_anything_is_computed(llm: LLM, bad, limit: int | None) -> None:
    if bad == "":
        bad = {"prompt": 5}
    with recorded_steps(llm) as steps, pytest.raises((RequestValidationError, RequestTypeError)):
        llm.beam_search(["a", "b", "c", bad], BeamSearchParams(2, 4), concurrency_limit=limit)
    assert steps == []
    assert_idle(llm)


def test_beam_search__priority_says_whose_beams_come_first(checkpoint: Path) -> None:
    prompts = [[60 + i, 1] for i in range(3)]
    with LLM(str(checkpoint), dtype="float32", scheduling_policy="priority", max_num_seqs=2) as narrow:
        expected = narrow.beam_search(prompts, BeamSearchParams(2, 4, **NO_END))
        with recorded_steps(narrow) as steps:
            found = narrow.beam_search(prompts, BeamSearchParams(2, 4, **NO_END), priority=[2, 0, 1])
        assert found == expected
        assert [n.token_ids[0] for s in steps for n in s.new if len(n.token_ids) == 2] == [61, 62, 60]
        for wrong in ([1], True, "x"):
            with pytest.raises((RequestValidationError, RequestTypeError)) as caught:
                narrow.beam_search(prompts, BeamSearchParams(2, 4), priority=wrong)
            assert caught.value.parameter == "priority"


def test_beam_search__use_tqdm_that_is_no_bar_is_refused_before_anything_is_computed(llm: LLM) -> None:
    with recorded_steps(llm) as steps, pytest.raises(RequestTypeError, match="use_tqdm must be True, False or a function"):
        llm.beam_search(["a"], BeamSearchParams(2, 4), use_tqdm="no")
    assert steps == []


def test_beam_search__what_is_not_supported_says_so(llm: LLM) -> None:
    with pytest.raises(UnsupportedFeatureError, match="lora_request"):
        llm.beam_search(["a"], BeamSearchParams(2, 4), lora_request=object())
    with pytest.raises(RequestTypeError, match="BeamSearchParams, got SamplingParams"):
        llm.beam_search(["a"], SamplingParams())
    with pytest.raises(RequestTypeError, match="decoder must be a name"):
        llm.beam_search(["a"], BeamSearchParams(2, 4), decoder=[])
    with pytest.raises(RequestValidationError, match="beam-search.*beam_search") as caught:
        llm.beam_search(["a"], BeamSearchParams(2, 4), decoder="beam-search")
    assert caught.value.parameter == "decoder"


def test_beam_search__use_tqdm_shows_a_bar_and_is_off_by_default(llm: LLM, capsys) -> None:
    llm.beam_search(["a", "b"], BeamSearchParams(2, 3))
    assert capsys.readouterr().err == ""
    llm.beam_search(["a", "b"], BeamSearchParams(2, 3), use_tqdm=True)
    assert "2/2" in capsys.readouterr().err


def test_beam_search__calls_of_both_kinds_run_side_by_side(llm: LLM) -> None:
    params, prompts = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), [[i, 9] for i in range(4)]
    expected, beams = llm.generate(prompts, params, use_tqdm=False), search(llm, PROMPTS, 3, 8, **NO_END)
    outputs = llm.generate_iter(prompts, params, max_in_flight=4)
    first = next(outputs)
    assert search_only(llm) == beams
    found = [first, *outputs]
    assert sorted(list(o.outputs[0].token_ids) for o in found) == sorted(list(o.outputs[0].token_ids) for o in expected)
    assert_idle(llm)


def search_only(llm: LLM) -> list[list[BeamSearchSequence]]:
    return [o.sequences for o in llm.beam_search(PROMPTS, BeamSearchParams(3, 8, **NO_END))]


def test_beam_search__one_broken_request_of_eight_leaves_seven_as_they_are(llm: LLM) -> None:
    prompts = [[60 + i, 1, 2] for i in range(8)]
    undisturbed = search(llm, prompts, 3, 6, **NO_END)
    (original,) = llm.apply_model(lambda model: model.forward)
    broken_token = undisturbed[3][0].tokens[5]

    def forward(inputs, ctx):
        rows = (inputs.token_ids == broken_token) & (inputs.positions[0] == 5)
        if bool(rows.any()) and state["armed"]:
            raise MemoryError("this token is too much")
        return original(inputs, ctx)

    state = {"armed": True}
    llm.apply_model(lambda model: setattr(model, "forward", forward))
    try:
        outputs = llm.beam_search(prompts, BeamSearchParams(3, 6, **NO_END), on_error="return")
        with pytest.raises(RequestFailedError, match="this token is too much"):
            llm.beam_search(prompts, BeamSearchParams(3, 6, **NO_END))
    finally:
        llm.apply_model(lambda model: setattr(model, "forward", original))
    assert_idle(llm)
    assert isinstance(outputs[3].error, RequestFailedError)
    touched = {i for i, sequences in enumerate(undisturbed) if any(broken_token in c for s in sequences for c in s.logprobs[2:3])}
    for i, output in enumerate(outputs):
        if output.error is None:
            assert [s.tokens for s in output.sequences] == [s.tokens for s in undisturbed[i]]
    assert {i for i, o in enumerate(outputs) if o.error} <= touched
    assert sum(o.error is None for o in outputs) >= 5
    assert search(llm, prompts, 3, 6, **NO_END) == undisturbed
