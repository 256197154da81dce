"""Calls on workers with a time limit, tokenizers, profiles, the prefix cache."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lifecycle_helpers import GREEDY, engine, tokens

from kvloom import LLM, SamplingParams, StructuredOutputsParams
from kvloom.errors import (
    ConfigError,
    EngineClosedError,
    EngineStateError,
    RequestFailedError,
    RequestTypeError,
    RequestValidationError,
    UnsupportedFeatureError,
)
from kvloom.testing.checkpoints import BOS, make_checkpoint
from kvloom_plugins.tokenizers.hf import AutoTokenizer


@pytest.fixture
def llm(small_checkpoint: Path) -> Iterator[LLM]:
    with engine(small_checkpoint) as made:
        yield made


# -- collective_rpc

def test_collective_rpc__in_time_gives_what_the_call_gives_or_raises(llm: LLM) -> None:
    assert llm.collective_rpc(lambda worker, a, b=0: (worker.rank, a, b), 30.0, (1,), {"b": 2}) == [(0, 1, 2)]
    with pytest.raises(ZeroDivisionError):
        llm.collective_rpc(lambda worker: 1 / 0, timeout=30)
    with pytest.raises(AttributeError, match="no_such_method"):
        llm.collective_rpc("no_such_method", timeout=30)
    assert len(tokens(llm)) == 3


@pytest.mark.parametrize("name", ["nope", "model", "rank", "_config", "_model", "_drop_runner", ""])
def test_collective_rpc__calls_methods_only(llm: LLM, name: str) -> None:
    with pytest.raises(AttributeError, match=f"has no method '{name}'"):
        llm.collective_rpc(name)


@pytest.mark.parametrize("call", [lambda llm: llm.collective_rpc(3), lambda llm: llm.apply_model("repr"), lambda llm: llm.apply_model(None)])
def test_what_is_no_function_is_refused(llm: LLM, call: Callable[[LLM], object]) -> None:
    with pytest.raises(RequestTypeError, match="function, got"):
        call(llm)


def test_collective_rpc__that_is_late_raises_and_the_engine_waits_for_its_end(llm: LLM) -> None:
    expected, may_end = tokens(llm), threading.Event()
    threads: list[threading.Thread] = []

    def slow(worker) -> None:
        threads.append(threading.current_thread())
        may_end.wait(60)

    try:
        with pytest.raises(TimeoutError, match=r"did not end within 0\.05 s"):
            llm.collective_rpc(slow, timeout=0.05)
        for call in (lambda: tokens(llm), lambda: llm.collective_rpc(lambda worker: 1), lambda: llm.apply_model(lambda model: 1), llm.sleep):
            with pytest.raises(EngineStateError, match="late is still running"):
                call()
    finally:
        may_end.set()
    threads[0].join(60)
    assert tokens(llm) == expected


def test_collective_rpc__that_is_late_delays_waking_up_and_spoils_nothing(llm: LLM) -> None:
    expected, may_end = tokens(llm), threading.Event()
    llm.sleep(2)
    try:
        with pytest.raises(TimeoutError):
            llm.collective_rpc(lambda worker: may_end.wait(60), timeout=0.05)
        with pytest.raises(EngineStateError, match="late is still running"):
            llm.wake_up()
    finally:
        may_end.set()
    join_late_calls()
    assert llm.wake_up()
    assert tokens(llm) == expected


def join_late_calls() -> None:
    for thread in threading.enumerate():
        if thread.name == "kvloom-call":
            thread.join(60)


def test_collective_rpc__that_is_late_leaves_requests_under_way_alone(llm: LLM) -> None:
    may_end = threading.Event()
    expected = tokens(llm, [[1, 2], [3]])
    running = llm.generate_iter([[1, 2], [3]], [GREEDY.clone(), GREEDY.clone()], max_in_flight=1)
    first = next(running)
    with pytest.raises(TimeoutError):
        llm.collective_rpc(lambda worker: may_end.wait(60), timeout=0.05)
    may_end.set()
    join_late_calls()
    assert [list(o.outputs[0].token_ids) for o in (first, *running)] == expected


def test_collective_rpc__that_is_late_does_not_keep_the_engine_from_closing(small_checkpoint: Path) -> None:
    may_end = threading.Event()
    with engine(small_checkpoint) as llm, pytest.raises(TimeoutError):
        llm.collective_rpc(lambda worker: may_end.wait(60), timeout=0.05)
    may_end.set()
    with pytest.raises(EngineClosedError):
        llm.collective_rpc(lambda worker: 1)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), True, "5"])
def test_collective_rpc__refuses_timeouts_that_are_none(llm: LLM, timeout: object) -> None:
    with pytest.raises(RequestValidationError, match="timeout must be a finite number"):
        llm.collective_rpc(lambda worker: 1, timeout=timeout)


def test_apply_model__gives_the_torch_module_and_what_the_function_returns(llm: LLM) -> None:
    (weights,) = llm.apply_model(lambda model: sum(p.nbytes for p in model.parameters()))
    assert weights == llm.llm_engine.plan.needs.weights_bytes
    with pytest.raises(ZeroDivisionError):
        llm.apply_model(lambda model: 1 / 0)
    llm.apply_model(lambda model: [p.data.zero_() for p in model.parameters()])
    assert {i for ids in tokens(llm) for i in ids} == {0}, "a model of zeros gives the first token only"


# -- tokenizer

def test_get_tokenizer__is_the_librarys_own_object(llm: LLM, small_checkpoint: Path) -> None:
    assert llm.get_tokenizer().encode("ab") == [BOS, *b"ab"]
    with engine(small_checkpoint, skip_tokenizer_init=True) as bare, pytest.raises(RequestValidationError, match="skip_tokenizer_init"):
        bare.get_tokenizer()


def other_tokenizer(directory: Path, **special: str):
    """transformers' object of the test tokenizer, in which letters have other ids and `special` tokens other roles."""
    import transformers

    make_checkpoint(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return transformers.AutoTokenizer.from_pretrained(str(directory), **special)


def test_set_tokenizer__serves_later_requests_with_its_ids_texts_and_end_token(llm: LLM, tmp_path: Path) -> None:
    tokenizer = other_tokenizer(tmp_path / "t", eos_token="Z")
    before = llm.generate("ab", GREEDY, use_tqdm=False)[0]
    llm.set_tokenizer(tokenizer)
    after = llm.generate("ab", GREEDY, use_tqdm=False)[0]
    assert llm.get_tokenizer() is tokenizer
    assert before.prompt_token_ids == [BOS, *b"ab"]
    assert after.prompt_token_ids == [BOS, *b"ba"]
    assert after.outputs[0].text == tokenizer.decode(after.outputs[0].token_ids, skip_special_tokens=True)
    assert llm.llm_engine.rules.end_tokens.eos_token_id == ord("Z")


@pytest.mark.parametrize("how", ["awake", "asleep", "had none"])
def test_set_tokenizer__structured_output_follows_it(small_checkpoint: Path, tmp_path: Path, how: str) -> None:
    asking = SamplingParams(temperature=0, max_tokens=8, structured_outputs=StructuredOutputsParams(regex="aab"))
    with engine(small_checkpoint, enable_sleep_mode=True, skip_tokenizer_init=how == "had none") as llm:
        prompt = {"prompt_token_ids": [BOS, 1]}
        if how == "had none":
            with pytest.raises(RequestValidationError, match="skip_tokenizer_init is True: structured output"):
                llm.generate(prompt, asking, use_tqdm=False)
        else:
            assert llm.generate(prompt, asking, use_tqdm=False)[0].outputs[0].token_ids[:3] == [*b"aab"]
        if how == "asleep":
            llm.sleep(2)
        llm.set_tokenizer(other_tokenizer(tmp_path / "t"))
        if how == "asleep":
            llm.wake_up()
        (completion,) = llm.generate(prompt, asking, use_tqdm=False)[0].outputs
        assert (completion.text, list(completion.token_ids[:3])) == ("aab", [*b"bba"])
        assert llm.validate_grammar(StructuredOutputsParams(regex="("))


def test_set_tokenizer__bad_words_and_stop_strings_follow_it(llm: LLM, tmp_path: Path) -> None:
    llm.set_tokenizer(other_tokenizer(tmp_path / "t"))
    only = {"temperature": 0, "max_tokens": 4, "allowed_token_ids": [ord("a"), ord("c")]}
    assert llm.generate("x", SamplingParams(**only, bad_words=["b"]), use_tqdm=False)[0].outputs[0].text == "cccc"
    stopped = llm.generate("x", SamplingParams(**only, bad_words=["c"], stop=["bb"]), use_tqdm=False)[0].outputs[0]
    assert (stopped.text, stopped.stop_reason) == ("", "bb")


def test_set_tokenizer__takes_our_own_kind_and_renders_chats_with_its_template(llm: LLM, tmp_path: Path) -> None:
    tokenizer = other_tokenizer(tmp_path / "t")
    messages = [{"role": "user", "content": "ab"}]
    for text in ("one", "two"):
        tokenizer.chat_template = text + "{{ messages[0].content }}"
        llm.set_tokenizer(AutoTokenizer.adopt(tokenizer))
        (rendered,) = llm.chat(messages, dry_run=True)
        assert rendered.prompt == f"{text}ab"
        assert llm.get_tokenizer() is tokenizer


def test_set_tokenizer__gives_one_to_an_engine_without(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, skip_tokenizer_init=True) as llm:
        llm.set_tokenizer(other_tokenizer(tmp_path / "t"))
        assert llm.generate("ab", GREEDY, use_tqdm=False)[0].prompt_token_ids == [BOS, *b"ba"]


def test_set_tokenizer__refuses_what_is_none_and_what_the_model_does_not_know(llm: LLM, tmp_path: Path) -> None:
    expected = tokens(llm, "ab")
    for wrong in ("gpt2", None, object(), AutoTokenizer):
        with pytest.raises(RequestTypeError, match=r"set_tokenizer takes a kvloom\.interfaces\.Tokenizer"):
            llm.set_tokenizer(wrong)
    large = other_tokenizer(tmp_path / "t")
    large.add_tokens([f"<{i}>" for i in range(40)])
    with pytest.raises(RequestValidationError, match="knows token ids up to 297, the model's are 0 to 287"):
        llm.set_tokenizer(large)
    assert tokens(llm, "ab") == expected


def test_set_tokenizer__is_refused_while_requests_are_under_way(llm: LLM, tmp_path: Path) -> None:
    tokenizer, texts = other_tokenizer(tmp_path / "t"), llm.generate(["ab", "b"], GREEDY, use_tqdm=False)
    short = GREEDY.clone()
    short.max_tokens = 2
    running = llm.generate_iter(["ab", "b"], [short, GREEDY], max_in_flight=2)
    next(running)
    with pytest.raises(EngineStateError, match=r"set_tokenizer\(\) has to wait"):
        llm.set_tokenizer(tokenizer)
    assert [o.outputs[0].text for o in running] == [texts[1].outputs[0].text]
    llm.set_tokenizer(tokenizer)


# -- prefix cache

def test_reset_prefix_cache__forgets_and_says_whether_it_could(llm: LLM) -> None:
    prompt = [list(range(1, 50))]
    cached = [llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
    for device in (None, "cpu", "CPU"):
        assert llm.reset_prefix_cache(device) is True
        cached += [llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
    assert cached == [0, 48] * 4
    short = GREEDY.clone()
    short.max_tokens = 2
    running = llm.generate_iter([*prompt, *prompt], [short, GREEDY], max_in_flight=2)
    next(running)
    assert llm.reset_prefix_cache() is False
    assert len(list(running)) == 1
    with pytest.raises(UnsupportedFeatureError, match="this engine's blocks are on 'cpu'"):
        llm.reset_prefix_cache(device="gpu")


# -- profiles

def events(file: str) -> list[str]:
    return [e.get("name", "") for e in json.loads(gzip.decompress(Path(file).read_bytes()))["traceEvents"]]


def test_start_profile__records_steps_until_stop_profile(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path / "new/traces")) as llm:
        tokens(llm)
        assert not (tmp_path / "new").exists()
        llm.start_profile("mine-")
        steps = llm.llm_engine.engine.scheduler._next_step_id
        assert len(tokens(llm)) == 3
        (file,) = llm.stop_profile()
        assert Path(file).parent == tmp_path / "new/traces"
        assert Path(file).name.startswith("mine-rank0-")
        names = events(file)
        assert f"step {steps}" in names
        assert any(name.startswith("aten::") for name in names)
        llm.start_profile()
        (second,) = llm.stop_profile()
        assert second != file
        assert not any(name.startswith("step ") for name in events(second))


def test_stop_profile__without_a_start_and_a_second_start_are_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path)) as llm:
        with pytest.raises(EngineStateError, match="was not started"):
            llm.stop_profile()
        llm.start_profile()
        with pytest.raises(EngineStateError, match="was started already"):
            llm.start_profile()
        assert len(llm.stop_profile()) == 1
        with pytest.raises(EngineStateError, match="was not started"):
            llm.stop_profile()
        llm.start_profile()
    assert len(list(tmp_path.iterdir())) == 1, "what is being recorded when the engine closes is forgotten"


def test_start_profile__is_refused_while_another_engine_records(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path)) as llm, engine(small_checkpoint, profile_dir=str(tmp_path)) as other:
        llm.start_profile()
        with pytest.raises(EngineStateError, match="another engine of this process"):
            other.start_profile()
        llm.close()
        other.start_profile()
        assert len(other.stop_profile()) == 1


@pytest.mark.parametrize(("prefix", "error"), [("../x", RequestValidationError), ("a" * 65, RequestValidationError), (5, RequestTypeError)])
def test_start_profile__refuses_prefixes_that_are_no_part_of_a_name(small_checkpoint: Path, tmp_path: Path, prefix: object,
                                                                    error: type[Exception]) -> None:
    with engine(small_checkpoint, profile_dir=str(tmp_path)) as llm:
        with pytest.raises(error, match="profile_prefix"):
            llm.start_profile(prefix)
        llm.start_profile()


def test_profile_dir__is_where_traces_go_and_is_needed_for_them(small_checkpoint: Path, tmp_path: Path) -> None:
    with engine(small_checkpoint) as llm, pytest.raises(EngineStateError, match="profile_dir="):
        llm.start_profile()
    (tmp_path / "file").write_text("")
    with engine(small_checkpoint, profile_dir=str(tmp_path / "file/traces")) as llm:
        with pytest.raises(ConfigError, match="profile_dir=.*cannot be made"):
            llm.start_profile()
        assert len(tokens(llm)) == 3


def test_what_a_step_calls_cannot_put_the_engine_to_sleep(llm: LLM) -> None:
    def meddle(token_ids, logits):
        llm.sleep()

    params = GREEDY.clone()
    params.logits_processors = [meddle]
    with pytest.raises(RequestFailedError, match="from inside the engine"):
        llm.generate("a", params, use_tqdm=False)
    assert len(tokens(llm)) == 3


# -- what workers are asked, and what they are not

@pytest.mark.parametrize(("name", "instead"), [("sleep", r"use LLM\.sleep\(\)"), ("close", r"use LLM\.close\(\)"), ("execute", "give a function"),
                                               ("allocate", "give a function")])
def test_collective_rpc__of_a_method_that_only_the_engine_may_call_is_refused(llm: LLM, name: str, instead: str) -> None:
    with pytest.raises(RequestValidationError, match=instead):
        llm.collective_rpc(name, args=(1,))
    assert len(tokens(llm)) == 3


@pytest.mark.parametrize("wrong", [{"args": 3}, {"args": "ab"}, {"args": None}, {"kwargs": 3}, {"kwargs": [1]}, {"kwargs": {1: 2}}])
def test_collective_rpc__refuses_what_are_no_arguments(llm: LLM, wrong: dict) -> None:
    with pytest.raises(RequestTypeError, match=f"{next(iter(wrong))} must be"):
        llm.collective_rpc(lambda worker, *args, **kwargs: 1, **wrong)


def test_repr__and_get_world_size_answer_while_it_sleeps(llm: LLM) -> None:
    assert "LlamaLayer" in repr(llm)
    llm.sleep(2)
    assert "call wake_up()" in repr(llm)
    assert llm.get_world_size() == 1
    llm.wake_up()
    assert "LlamaLayer" in repr(llm)
