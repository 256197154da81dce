"""What `LLM.generate` gives, and that what it refuses or loses leaves the engine as it was."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvloom import LLM, SamplingParams
from kvloom.errors import (
    ConfigError,
    EngineClosedError,
    RequestFailedError,
    RequestTypeError,
    RequestValidationError,
    UnsupportedArchitectureError,
    UnsupportedFeatureError,
)
from kvloom.testing.checkpoints import BOS, VOCAB_SIZE, make_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(small_checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(small_checkpoint), dtype="float32", max_model_len=100) as made:
        yield made


def run(llm: LLM, prompts, params=GREEDY, **kwargs):
    outputs = llm.generate(prompts, params, use_tqdm=False, **kwargs)
    assert_idle(llm)
    return outputs


def assert_idle(llm: LLM) -> None:
    scheduler = llm.llm_engine.engine.scheduler
    scheduler.check_integrity()
    assert not llm.llm_engine.has_work
    assert scheduler.num_free_blocks == scheduler.num_usable_blocks


def token_ids(outputs) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]


def test_an_output_has_every_field(llm: LLM) -> None:
    (output,) = run(llm, "Hello")
    assert output.prompt == "Hello"
    assert output.prompt_token_ids == [BOS, *llm.get_tokenizer()("Hello")["input_ids"][1:]]
    assert output.finished
    assert output.prompt_logprobs is None
    (done,) = output.outputs
    assert (done.index, done.finish_reason, done.stop_reason, len(done.token_ids)) == (0, "length", None, 6)
    assert done.text == llm.get_tokenizer().decode(done.token_ids)
    m = output.metrics
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.last_token_time <= m.finished_time
    assert m.time_in_queue == m.first_scheduled_time - m.arrival_time


def test_results_come_in_the_order_of_the_prompts_and_ids_count_up(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 1, 5)]
    first, second = run(llm, ["a", "b", "c"], params), run(llm, ["d"])
    assert [len(t) for t in token_ids(first)] == [9, 1, 5]
    ids = [int(o.request_id) for o in (*first, *second)]
    assert ids == list(range(ids[0], ids[0] + 4))


def test_prompts_of_all_forms_give_the_same(llm: LLM) -> None:
    ids = llm.get_tokenizer()("Hi")["input_ids"]
    outputs = run(llm, ["Hi", {"prompt": "Hi"}, ids, {"prompt_token_ids": ids}, {"prompt_token_ids": ids, "prompt": "given"}])
    assert len({tuple(t) for t in token_ids(outputs)}) == 1
    assert [o.prompt for o in outputs] == ["Hi", "Hi", None, None, "given"]
    assert run(llm, []) == []


def test_the_default_parameters_are_vllms(llm: LLM) -> None:
    assert len(token_ids(run(llm, "a", None))[0]) <= 16
    assert llm.get_default_sampling_params() == SamplingParams()


def test_max_tokens_none_goes_to_the_models_length(llm: LLM) -> None:
    (output,) = run(llm, [[1] * 90], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 10
    assert output.outputs[0].finish_reason == "length"


def test_a_prompt_one_shorter_than_the_model_gives_exactly_one_token(llm: LLM) -> None:
    (output,) = run(llm, [[1] * 99], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (1, "length")


def test_stop_tokens_are_kept_in_the_ids_and_left_out_of_the_text(llm: LLM) -> None:
    (plain,) = run(llm, [[5, 6, 7]])
    ids = list(plain.outputs[0].token_ids)
    stop_at = ids.index(next(t for t in ids if t != ids[0])) if len(set(ids)) > 1 else 0
    (stopped,) = run(llm, [[5, 6, 7]], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop_token_ids=[ids[stop_at]]))
    done = stopped.outputs[0]
    assert list(done.token_ids) == ids[:stop_at + 1]
    assert (done.finish_reason, done.stop_reason) == ("stop", ids[stop_at])
    assert done.text == llm.get_tokenizer().decode(ids[:stop_at])


def test_end_of_text_stops_without_a_reason_unless_ignored(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), dtype="float32", skip_tokenizer_init=True) as llm:
        first = token_ids(run(llm, [[5, 6, 7]]))[0][0]
    with LLM(str(small_checkpoint), dtype="float32", skip_tokenizer_init=True, hf_overrides={"eos_token_id": [first, 3]}) as llm:
        stops, goes_on = SamplingParams(temperature=0, max_tokens=6), GREEDY
        (a,), (b,) = run(llm, [[5, 6, 7]], stops), run(llm, [[5, 6, 7]], goes_on)
    assert (list(a.outputs[0].token_ids), a.outputs[0].finish_reason, a.outputs[0].stop_reason) == ([first], "stop", None)
    assert len(b.outputs[0].token_ids) == 6


def test_a_second_end_token_is_the_stop_reason(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), dtype="float32", skip_tokenizer_init=True) as llm:
        first = token_ids(run(llm, [[5, 6, 7]]))[0][0]
    with LLM(str(small_checkpoint), dtype="float32", skip_tokenizer_init=True, hf_overrides={"eos_token_id": [3, first]}) as llm:
        (output,) = run(llm, [[5, 6, 7]], SamplingParams(temperature=0, max_tokens=6))
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", first)


def test_detokenize_false_gives_no_text(llm: LLM) -> None:
    (output,) = run(llm, "a", SamplingParams(temperature=0, max_tokens=3, detokenize=False, ignore_eos=True))
    assert output.outputs[0].text == ""
    assert len(output.outputs[0].token_ids) == 3


def test_without_a_tokenizer_only_token_prompts_are_taken(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), skip_tokenizer_init=True) as llm:
        (output,) = run(llm, [[1, 2, 3]])
        assert (output.prompt, output.outputs[0].text, len(output.outputs[0].token_ids)) == (None, "", 6)
        with pytest.raises(RequestValidationError, match="Unable to get tokenizer because skip_tokenizer_init is True"):
            run(llm, "text")
        with pytest.raises(RequestValidationError, match="skip_tokenizer_init"):
            llm.get_tokenizer()
        with pytest.raises(RequestValidationError, match="out of vocabulary"):
            run(llm, [[VOCAB_SIZE]])


# -- randomness

SAMPLED = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)


def test_a_seed_decides_whatever_the_neighbours(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=11)
    alone = token_ids(run(llm, [[1, 2]], seeded))[0]
    together = token_ids(run(llm, [[3], [1, 2], [4, 5, 6]], [SAMPLED, seeded, GREEDY]))[1]
    assert alone == together
    other = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=12)
    assert token_ids(run(llm, [[1, 2]], other))[0] != alone


def test_without_a_seed_equal_prompts_differ_and_a_rerun_repeats(small_checkpoint: Path) -> None:
    runs = []
    for seed in (None, 0, 5):
        with LLM(str(small_checkpoint), dtype="float32", seed=seed) as llm:
            runs.append(token_ids(run(llm, ["same", "same"], SAMPLED)))
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_seed_minus_one_is_no_seed(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, seed=-1)
    a, b = token_ids(run(llm, ["x", "x"], seeded))
    assert a != b


# -- refusals: nothing is computed, nothing stays

@pytest.mark.parametrize(("prompts", "message"), [
    ([[1], [VOCAB_SIZE]], f"Token id {VOCAB_SIZE} is out of vocabulary"), ([[-1]], "out of vocabulary"), (["a", [[]]], "list of integers"),
    ([[1], [1] * 100], "longer than the maximum model length of 100"), ([[]], "cannot be empty"), ([[1] * 5000], "longer than"),
])
def test_a_bad_prompt_refuses_the_whole_call(llm: LLM, prompts, message: str) -> None:
    with pytest.raises((RequestValidationError, RequestTypeError), match=message):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert_idle(llm)
    assert len(run(llm, ["next"])) == 1


@pytest.mark.parametrize(("params", "priority", "message"), [
    ([GREEDY], None, "lengths of prompts and params"), ((GREEDY,) * 3, None, "lengths of prompts and params"),
    (GREEDY, [1], "lengths of prompts and priority"), (GREEDY, [], "lengths of prompts and priority"), (GREEDY, [1, True], "priority"),
    (GREEDY, [1, 1.5], "priority"), (["x", GREEDY], None, "must be SamplingParams"),
])
def test_lists_that_do_not_fit_the_prompts_are_refused(llm: LLM, params, priority, message: str) -> None:
    with pytest.raises((RequestValidationError, RequestTypeError), match=message):
        llm.generate(["a", "b"], params, use_tqdm=False, priority=priority)
    assert_idle(llm)


@pytest.mark.parametrize("name", ["lora_request", "prompt_adapter_request"])
def test_arguments_of_later_features_are_refused_by_name(llm: LLM, name: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=name):
        llm.generate("a", GREEDY, use_tqdm=False, **{name: object()})


def test_the_callers_parameters_are_not_changed_and_are_checked_again(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, stop_token_ids=[3])
    before = params.clone()
    run(llm, ["a", "b"], params)
    assert params == before
    params.temperature = float("nan")
    with pytest.raises(RequestValidationError, match="temperature"):
        run(llm, "a", params)


def test_a_request_that_can_never_fit_is_refused_with_the_arithmetic(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), num_gpu_blocks_override=5) as llm:
        with pytest.raises(RequestValidationError, match=r"can never fit: 60 prompt tokens.*KV cache has 4.*lower max_tokens to 5") as caught:
            llm.generate([[1] * 60, [1]], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
        assert isinstance(caught.value, ValueError)
        assert_idle(llm)
        (output,) = run(llm, [[1] * 60], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 5


# -- failures while running

def test_a_model_that_raises_fails_the_call_and_leaves_the_engine_empty(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        expected = token_ids(run(llm, ["a"]))
        (original,) = llm.apply_model(lambda model: model.forward)

        def explode(*args: object) -> None:
            raise ArithmeticError("the device is on fire")

        llm.apply_model(lambda model: setattr(model, "forward", explode))
        with pytest.raises(RequestFailedError, match="ArithmeticError: the device is on fire") as caught:
            llm.generate(["a", "b"], GREEDY, use_tqdm=False)
        assert isinstance(caught.value.__cause__, ArithmeticError)
        llm.apply_model(lambda model: setattr(model, "forward", original))
        assert_idle(llm)
        assert token_ids(run(llm, ["a"])) == expected


def test_logits_that_are_not_finite_fail_their_request(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        (original,) = llm.apply_model(lambda model: model.logits)
        llm.apply_model(lambda model: setattr(model, "logits", lambda h, ctx: original(h, ctx) * float("nan")))
        with pytest.raises(RequestFailedError, match="not finite"):
            llm.generate(["a"], GREEDY, use_tqdm=False)
        assert_idle(llm)


def test_an_interrupted_call_leaves_nothing_behind(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        (original,) = llm.apply_model(lambda model: model.forward)
        calls = []

        def interrupted(*args: object) -> object:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(*args)

        llm.apply_model(lambda model: setattr(model, "forward", interrupted))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY, use_tqdm=False)
        assert_idle(llm)
        assert len(run(llm, ["c"])) == 1


# -- the life of an engine

def test_a_closed_engine_says_so(small_checkpoint: Path) -> None:
    llm = LLM(str(small_checkpoint))
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate("a", GREEDY)


def test_deleting_an_engine_frees_its_model_and_its_cache(small_checkpoint: Path) -> None:
    llm = LLM(str(small_checkpoint))
    (model,) = llm.apply_model(weakref.ref)
    engine = weakref.ref(llm)
    run(llm, "a")
    del llm
    gc.collect()
    assert engine() is None
    assert model() is None


def test_a_file_gives_the_same_engine_as_arguments(small_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(f"model: {small_checkpoint}\ndtype: float32\nmax_num_seqs: 3\nblock_size: 8\n")
    with LLM.from_config(file) as a, LLM(str(small_checkpoint), dtype="float32", max_num_seqs=3, block_size=8, plugins=[]) as b:
        assert a.llm_engine.plan.needs == b.llm_engine.plan.needs
        assert token_ids(run(a, ["x", "y"])) == token_ids(run(b, ["x", "y"]))
    with LLM.from_config(file, block_size=4) as c:
        assert c.llm_engine.plan.needs.groups[0].block_tokens == 4


def test_priority_decides_who_is_served_first(small_checkpoint: Path) -> None:
    with LLM(str(small_checkpoint), scheduling_policy="priority", max_num_seqs=1) as llm:
        outputs = run(llm, ["a", "b", "c"], priority=[2, 1, 0])
    finished = [o.metrics.finished_time for o in outputs]
    assert finished == sorted(finished, reverse=True)


def test_equal_beginnings_are_computed_once_unless_caching_is_off(small_checkpoint: Path) -> None:
    prompt = list(range(1, 50))
    for caching, cached in ((True, 48), (False, 0)):
        with LLM(str(small_checkpoint), dtype="float32", enable_prefix_caching=caching) as llm:
            cold, warm = run(llm, [prompt])[0], run(llm, [prompt])[0]
            assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, cached)
            assert token_ids([cold]) == token_ids([warm])
            assert llm.reset_prefix_cache()
            assert run(llm, [prompt])[0].num_cached_tokens == 0


def test_the_progress_bar_goes_to_standard_error_or_nowhere(llm: LLM, capsys) -> None:
    llm.generate("a", GREEDY)
    assert "Processed prompts: 100%" in capsys.readouterr().err
    llm.generate("a", GREEDY, use_tqdm=False)
    assert capsys.readouterr() == ("", "")


def test_dummy_weights_need_only_a_config(tmp_path: Path, small_checkpoint: Path) -> None:
    (tmp_path / "config.json").write_text((small_checkpoint / "config.json").read_text())
    with LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, dtype="float32") as a:
        assert token_ids(run(a, [[1, 2]])) == token_ids(run(a, [[1, 2]]))


@pytest.mark.parametrize(("values", "message"), [
    ({"load_format": "pickle"}, "load_format='pickle'"), ({"scheduling_policy": "lottery"}, "scheduling_policy='lottery'"),
    ({"tokenizer_mode": "magic"}, "Unknown tokenizer mode 'magic'"), ({"distributed_executor_backend": "ray"}, "distributed_executor_backend='ray'"),
    ({"attention_backend": "cpv"}, "did you mean 'cpu'"), ({"quantization": "awq"}, "does not match"),
    ({"hf_overrides": {"quantization_config": {"quant_method": "awq"}}}, "Unknown quantization method 'awq'"),
    ({"hf_overrides": {"quantization_config": {"bits": 4}}}, "must name its quant_method"),
    ({"max_model_len": 513}, "max_model_len=513"), ({"attention_backend": "cpu", "dtype": "float16"}, "computes in float32 or bfloat16"),
])
def test_a_name_that_nobody_registered_is_refused_with_what_is(small_checkpoint: Path, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(small_checkpoint), **values)


def test_an_unknown_architecture_lists_what_is_registered_and_by_whom(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LamaForCausalLM"]}))
    with pytest.raises(UnsupportedArchitectureError, match=r"(?s)\['LamaForCausalLM'\] are not supported for now.*did you mean "
                                                           r"'LlamaForCausalLM'.*Qwen3ForCausalLM \(by kvloom\)"):
        LLM(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedArchitectureError, match="are not supported for now"):
        LLM(str(tmp_path))


def test_a_missing_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", tokenizer=False)
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded.*tokenizer\.json.*skip_tokenizer_init=True"):
        LLM(str(directory))


def test_float16_and_bfloat16_run(small_checkpoint: Path) -> None:
    for dtype in ("float16", torch.bfloat16):
        with LLM(str(small_checkpoint), dtype=dtype) as llm:
            assert len(token_ids(run(llm, ["a"]))[0]) == 6


def test_notes_without_effect_are_logged_once(small_checkpoint: Path, capsys) -> None:
    with LLM(str(small_checkpoint), swap_space=1.0):
        pass
    assert capsys.readouterr().err.count("swap_space=1.0 has no effect: on a CPU device") == 1


def test_an_unsupported_value_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=2 is not supported so far; use 1"):
        LLM("/nowhere", tensor_parallel_size=2)


def test_a_hub_id_runs_offline_from_the_hubs_cache(tmp_path: Path) -> None:
    """Two revisions in a cache as huggingface_hub lays it out; they differ in vocabulary."""
    folder = tmp_path / "models--acme--tiny"
    (folder / "refs").mkdir(parents=True)
    for revision, vocab_size in (("main", 288), ("v2", 300)):
        commit = f"{vocab_size:040x}"
        make_checkpoint(folder / "snapshots" / commit, vocab_size=vocab_size)
        (folder / "refs" / revision).write_text(commit)
    for revision, vocab_size in ((None, 288), ("v2", 300)):
        with LLM("acme/tiny", download_dir=str(tmp_path), revision=revision, dtype="float32") as llm:
            assert len(token_ids(run(llm, [[vocab_size - 1]]))[0]) == 6
            assert run(llm, "text")[0].prompt_token_ids[0] == BOS
            with pytest.raises(RequestValidationError, match="out of vocabulary"):
                run(llm, [[vocab_size]])
