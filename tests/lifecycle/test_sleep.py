"""Sleeping gives memory back, computes nothing, and waking up leads to an engine that computes the same."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from lifecycle_helpers import GREEDY, PROMPTS, engine, separate_device, tokens

from kvloom import LLM
from kvloom.errors import (
    EngineStateError,
    MemoryPlanError,
    RequestTypeError,
    RequestValidationError,
    UnsupportedFeatureError,
)
from kvloom.runtime import device
from kvloom.runtime.host_memory import DeviceMemory
from kvloom.runtime.worker import DeviceWorker
from kvloom.sleep import Sleeper, SleepState
from kvloom.testing.checkpoints import make_checkpoint


@pytest.fixture
def llm(small_checkpoint: Path) -> Iterator[LLM]:
    with engine(small_checkpoint) as made:
        yield made


def state(llm: LLM) -> SleepState:
    return llm.llm_engine.sleeper.state


@pytest.mark.parametrize("level", [1, 2])
def test_sleep__and_waking_up_change_no_token_and_forget_prefixes(llm: LLM, level: int) -> None:
    before = tokens(llm)
    assert llm.generate([PROMPTS[0]], GREEDY, use_tqdm=False)[0].num_cached_tokens > 0
    llm.sleep(level)
    assert llm.wake_up() is True
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [o.num_cached_tokens for o in outputs] == [0, 0, 0]
    assert [list(o.outputs[0].token_ids) for o in outputs] == before
    llm.sleep(level=3 - level)
    llm.wake_up()
    assert tokens(llm) == before


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("device_is_separate", [False, True])
@pytest.mark.parametrize("order", [("weights", "kv_cache"), ("kv_cache", "weights")])
def test_wake_up__takes_parts_in_any_order_and_says_when_all_are_awake(install, small_checkpoint: Path, level: int,
                                                                       order: tuple[str, str], device_is_separate: bool) -> None:
    if device_is_separate:
        separate_device(install)
    with engine(small_checkpoint, distributed_executor_backend="separate" if device_is_separate else "uni") as llm:
        before = tokens(llm)
        llm.sleep(level)
        assert state(llm) is SleepState.ASLEEP
        assert llm.wake_up(tags=[order[0]]) is False
        assert state(llm) is SleepState.PARTLY_AWAKE
        with pytest.raises(EngineStateError, match=f"sleeps at level {level}: {order[1]}; call wake_up"):
            tokens(llm)
        assert llm.wake_up([order[1]]) is True
        assert tokens(llm) == before


def test_sleep__refuses_requests_and_what_needs_the_weights(llm: LLM) -> None:
    llm.sleep(2)
    for call in (lambda: llm.generate("a", GREEDY, use_tqdm=False), lambda: next(llm.generate_iter(["a"], GREEDY)),
                 lambda: llm.generate("a", GREEDY, use_tqdm=False, on_error="return")):
        with pytest.raises(EngineStateError, match="sleeps at level 2: kv_cache and weights; call wake_up"):
            call()
    with pytest.raises(EngineStateError, match="weights are not loaded"):
        llm.apply_model(lambda model: model)
    assert llm.collective_rpc(lambda worker: worker.rank) == [0]
    assert llm.wake_up()
    assert not llm.llm_engine.has_work


def test_sleep__needs_enable_sleep_mode(small_checkpoint: Path) -> None:
    with engine(small_checkpoint, enable_sleep_mode=False) as llm:
        with pytest.raises(EngineStateError, match="enable_sleep_mode=True"):
            llm.sleep()
        assert len(tokens(llm)) == 3


def test_enable_sleep_mode__allows_sleep_and_changes_nothing_else(small_checkpoint: Path) -> None:
    with engine(small_checkpoint, enable_sleep_mode=False) as plain, engine(small_checkpoint, enable_sleep_mode=True) as sleeper:
        assert tokens(plain) == tokens(sleeper)
        sleeper.sleep()
        assert state(sleeper) is SleepState.ASLEEP


def test_sleep__waits_for_no_request_but_refuses_and_harms_none(llm: LLM) -> None:
    expected = tokens(llm)
    running = llm.generate_iter(PROMPTS, [replace(GREEDY, max_tokens=n) for n in (2, 12, 12)], max_in_flight=3)
    first = next(running)
    with pytest.raises(EngineStateError, match=r"sleep\(\) has to wait: .* under way"):
        llm.sleep()
    outputs = sorted([first, *running], key=lambda o: int(o.request_id))
    assert [list(o.outputs[0].token_ids) for o in outputs] == [expected[0][:2], *expected[1:]]
    llm.sleep()


@pytest.mark.parametrize(("level", "error"), [(0, UnsupportedFeatureError), (3, RequestValidationError), (True, RequestValidationError),
                                              (-1, RequestValidationError), ("1", RequestValidationError), (None, RequestValidationError)])
def test_sleep__of_another_level_is_refused(llm: LLM, level: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="level"):
        llm.sleep(level)
    assert state(llm) is SleepState.AWAKE


@pytest.mark.parametrize(("tags", "error"), [("weights", RequestTypeError), (["scheduling"], RequestValidationError),
                                             ([], RequestValidationError), ([1], RequestTypeError), (5, RequestTypeError)])
def test_wake_up__of_other_tags_is_refused(llm: LLM, tags: object, error: type[Exception]) -> None:
    llm.sleep()
    with pytest.raises(error, match="weights, kv_cache"):
        llm.wake_up(tags)
    assert state(llm) is SleepState.ASLEEP


def test_sleep__twice_and_wake_up_for_nothing_warn_and_do_nothing(llm: LLM, capsys) -> None:
    assert llm.wake_up() is True
    llm.sleep(1)
    llm.sleep(2)
    assert llm.llm_engine.sleeper._level == 1
    llm.wake_up(["weights"])
    assert llm.wake_up(["weights"]) is False
    assert llm.wake_up() is True
    said = capsys.readouterr().err
    assert (said.count("sleep() changes nothing"), said.count("wake_up() changes nothing")) == (1, 2)


def test_wake_up__that_finds_no_memory_leaves_the_engine_asleep_and_can_be_tried_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokens(llm)
    llm.sleep(2)
    with monkeypatch.context() as patch:
        patch.setattr(device, "host_memory", lambda: DeviceMemory(2**30, 1000))
        with pytest.raises(MemoryPlanError, match="does not fit"):
            llm.wake_up()
        assert state(llm) is SleepState.ASLEEP
        with pytest.raises(EngineStateError, match="sleeps"):
            tokens(llm)
    assert llm.wake_up() is True
    assert tokens(llm) == before


class Workers:
    """An executor of which `broken` verbs raise."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.calls: list = []

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))
        if "sleep" in self.broken:
            raise MemoryError

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", tuple(tags)))
        if "wake_up" in self.broken:
            raise MemoryError


def test_the_states_follow_the_drawing() -> None:
    workers = Workers()
    sleeper = Sleeper(workers, lambda: 0)
    assert sleeper.state is SleepState.AWAKE
    sleeper.sleep(2)
    sleeper.wake_up(["weights"])
    workers.broken = {"wake_up"}
    with pytest.raises(MemoryError):
        sleeper.wake_up(None)
    assert sleeper.state is SleepState.ASLEEP
    workers.broken = {"wake_up", "sleep"}
    with pytest.raises(MemoryError):
        sleeper.wake_up(None)
    assert sleeper.state is SleepState.FAILED
    for call in (sleeper.check_awake, lambda: sleeper.wake_up(None)):
        with pytest.raises(EngineStateError, match="close this engine"):
            call()
    assert workers.calls == [("sleep", 2), ("wake_up", ("weights",)), ("wake_up", ("kv_cache",)), ("sleep", 2),
                             ("wake_up", ("weights", "kv_cache")), ("sleep", 2)]


def test_sleep__logs_what_was_held_before_and_after(llm: LLM) -> None:
    try:
        with structlog.testing.capture_logs() as events:
            llm.sleep(2)
            llm.wake_up()
    finally:
        structlog.reset_defaults()
    asleep, awake = (next(e for e in events if e["event"] == name) for name in ("asleep", "awake"))
    assert asleep["before_bytes"] == awake["before_bytes"] > 0
    assert asleep["asleep_bytes"] == awake["asleep_bytes"] > 0
    assert awake["awake_bytes"] > 0


MEASURE = """
import sys
from kvloom import LLM, SamplingParams
from kvloom.runtime.host_memory import host_memory
llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", kv_cache_memory="64MiB", max_model_len=2048, enable_sleep_mode=True)
params = SamplingParams(temperature=0, max_tokens=2)
def fill():
    "Use all of the cache, whose pages come with their first use."
    llm.collective_rpc(lambda worker: [tensor.fill_(0) for cache in worker._caches.values() for tensor in cache.tensors])
    llm.generate([[1, 2, 3]], params, use_tqdm=False)
held = []
for level in (1, 2):
    fill()
    held.append(host_memory().own_bytes)
    llm.sleep(level)
    held.append(host_memory().own_bytes)
    llm.wake_up()
    fill()
    held.append(host_memory().own_bytes)
print(*held, llm.llm_engine.plan.needs.weights_bytes, llm.llm_engine.plan.cache_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_sleep__gives_back_the_cache_at_level_1_and_the_weights_too_at_level_2(tmp_path: Path) -> None:
    big = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 1000, "num_attention_heads": 8,
           "num_key_value_heads": 8, "max_position_embeddings": 2048}
    directory = make_checkpoint(tmp_path / "m", tokenizer=False, **big)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(directory)], capture_output=True, text=True, check=True, timeout=300)
    before_1, asleep_1, after_1, before_2, asleep_2, after_2, weights, cache = map(int, done.stdout.split())
    assert before_1 - asleep_1 >= 0.9 * cache
    assert before_2 - asleep_2 >= 0.9 * (cache + weights)
    slack = 0.1 * (cache + weights)
    assert abs(after_1 - before_1) <= slack
    assert abs(after_2 - before_2) <= slack


def once_interrupted(original: Callable[..., None]) -> Callable[..., None]:
    def call(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)
        original(*args)

    return call


@pytest.mark.parametrize("level", [1, 2])
def test_sleep__is_not_interrupted_in_the_middle(llm: LLM, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    expected = tokens(llm)
    with monkeypatch.context() as patch:
        patch.setattr(DeviceWorker, "sleep", once_interrupted(DeviceWorker.sleep))
        with pytest.raises(KeyboardInterrupt):
            llm.sleep(level)
    assert llm.llm_engine.sleeper.state is SleepState.ASLEEP
    assert llm.wake_up() is True
    assert tokens(llm) == expected


@pytest.mark.parametrize("again", [False, True])
def test_wake_up__that_is_interrupted_leaves_it_asleep(llm: LLM, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    expected = tokens(llm)
    llm.sleep(2)
    with monkeypatch.context() as patch:
        patch.setattr(DeviceWorker, "wake_up", once_interrupted(DeviceWorker.wake_up))
        if again:  # while what was awake goes back to sleep
            patch.setattr(DeviceWorker, "sleep", once_interrupted(DeviceWorker.sleep))
        with pytest.raises(KeyboardInterrupt):
            llm.wake_up()
    assert llm.llm_engine.sleeper.state is SleepState.ASLEEP
    assert llm.wake_up() is True
    assert tokens(llm) == expected
