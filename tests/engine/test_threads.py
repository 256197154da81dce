"""One engine used by several threads, which take turns step by step, and by what it calls itself."""

from __future__ import annotations

import contextvars
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvloom import LLM, SamplingParams, StructuredOutputsParams
from kvloom.errors import EngineClosedError, EngineStateError, RequestFailedError

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS = [[n, n + 1, n + 2] for n in range(0, 40, 5)]
ONE_BY_ONE = [SamplingParams(temperature=0.0, max_tokens=4 * n, ignore_eos=True) for n in range(1, 9)]
"""Outputs that do not end all at once."""


@pytest.fixture
def llm(small_checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(small_checkpoint), dtype="float32", enable_sleep_mode=True) as made:
        yield made


def tokens(llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]


def free_blocks(llm: LLM) -> float:
    return llm.llm_engine.stats()["free_blocks"]


def test_calls_of_several_threads_get_their_own_outputs(llm: LLM) -> None:
    expected = tokens(llm, PROMPTS)
    free = free_blocks(llm)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = list(pool.map(lambda prompt: tokens(llm, [prompt]), PROMPTS))
            assert [one for (one,) in found] == expected
    assert free_blocks(llm) == free


def test_maintenance_from_another_thread_waits_for_its_turn(llm: LLM) -> None:
    expected = tokens(llm, PROMPTS)
    started, done = threading.Event(), threading.Event()
    seen: list[int] = []

    def others() -> None:
        started.wait()
        while not done.is_set():
            seen.append(llm.apply_model(lambda model: len(list(model.parameters())))[0])
            llm.reset_prefix_cache()

    thread = threading.Thread(target=others)
    thread.start()
    try:
        started.set()
        for _ in range(3):
            assert tokens(llm, PROMPTS) == expected
    finally:
        done.set()
        thread.join()
    assert len(set(seen)) == 1


def test_sleep_is_refused_while_another_thread_has_requests_under_way(llm: LLM) -> None:
    iterator = llm.generate_iter(PROMPTS, ONE_BY_ONE)
    next(iterator)
    with ThreadPoolExecutor(1) as pool, pytest.raises(EngineStateError, match="under way"):
        pool.submit(llm.sleep, 1).result()
    assert len(list(iterator)) == len(PROMPTS) - 1


@pytest.mark.parametrize("inner", [lambda llm: tokens(llm, [[1]]), lambda llm: llm.sleep(1), lambda llm: llm.reset_prefix_cache(),
                                   lambda llm: llm.apply_model(repr), lambda llm: llm.close()],
                         ids=["generate", "sleep", "reset_prefix_cache", "apply_model", "close"])
def test_a_function_that_the_engine_calls_cannot_call_the_engine(llm: LLM, inner) -> None:
    problems: list[BaseException] = []

    def processor(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        with pytest.raises(RequestFailedError, match="from inside the engine") as caught:
            inner(llm)
        problems.append(caught.value)
        return logits

    asking = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logits_processors=[processor])
    assert tokens(llm, [[1, 2, 3]], asking) == [tokens(llm, [[1, 2, 3]])[0][:4]]
    assert len(problems) == 4


def test_an_iterator_that_is_dropped_during_a_step_frees_its_blocks(llm: LLM) -> None:
    free = free_blocks(llm)
    held = [llm.generate_iter(PROMPTS, ONE_BY_ONE)]
    next(held[0])

    def processor(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        held.clear()
        return logits

    asking = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logits_processors=[processor])
    assert tokens(llm, [[1, 2, 3]], asking) == [tokens(llm, [[1, 2, 3]])[0][:4]]
    assert not llm.llm_engine.has_work
    llm.reset_prefix_cache()
    assert free_blocks(llm) == free


def test_a_thread_whose_engine_another_one_closes_is_told(small_checkpoint: Path) -> None:
    llm = LLM(str(small_checkpoint), dtype="float32")
    iterator = llm.generate_iter(PROMPTS, ONE_BY_ONE)
    next(iterator)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(llm.close).result()
    with pytest.raises(EngineClosedError):
        list(iterator)


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_conversations_and_grammars_of_several_threads_do_not_get_mixed_up(llm: LLM) -> None:
    def rendered(number: int) -> bool:
        text = f"number {number} " * 50
        return all(llm.chat([{"role": "user", "content": text}], chat_template=TEMPLATE, dry_run=True)[0].prompt == text for _ in range(20))

    def judged(number: int) -> bool:
        wrong = bool(number % 2)
        structure = StructuredOutputsParams(regex="(" if wrong else "a")
        return all(bool(llm.validate_grammar(structure)) is wrong for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(rendered, range(4)))
        assert all(pool.map(judged, range(4)))


def test_a_worker_call_with_a_time_limit_cannot_call_the_engine_either(llm: LLM) -> None:
    def call(worker: object) -> None:
        with pytest.raises(RequestFailedError, match="from inside the engine"):
            tokens(llm, [[1]])

    llm.collective_rpc(call, timeout=60)


def test_a_thread_that_outlives_the_turn_in_which_it_was_started_may_call_the_engine(llm: LLM) -> None:
    expected, may_go_on = tokens(llm, [[1]]), threading.Event()

    def later() -> list[list[int]]:
        may_go_on.wait(60)
        return tokens(llm, [[1]])

    with ThreadPoolExecutor(1) as pool:
        (promised,) = llm.apply_model(lambda model: pool.submit(contextvars.copy_context().run, later))
        may_go_on.set()
        assert promised.result(60) == expected


def until_interrupted(timer: threading.Timer, call: Callable[[], object]) -> None:
    timer.start()
    call()
    while True:  # a signal that comes just before one long sleep does not end it
        time.sleep(0.01)


def test_ctrl_c_at_any_moment_leaves_an_engine_that_works(llm: LLM) -> None:
    expected = tokens(llm, PROMPTS)
    llm.reset_prefix_cache()
    free, interrupted = free_blocks(llm), 0
    began_s = time.perf_counter()
    tokens(llm, PROMPTS)
    took_s = time.perf_counter() - began_s
    for i in range(40):
        timer = threading.Timer(took_s * (i % 20) / 20, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        done: list[list[list[int]]] = []
        with pytest.raises(KeyboardInterrupt):
            until_interrupted(timer, lambda done=done: done.append(tokens(llm, PROMPTS)))
        timer.join()
        interrupted += not done
    assert interrupted > 1
    assert tokens(llm, PROMPTS) == expected
    llm.llm_engine.engine.scheduler.check_integrity()
    llm.reset_prefix_cache()
    assert free_blocks(llm) == free


def test_a_second_ctrl_c_ends_a_step_that_does_not_end(llm: LLM) -> None:
    asking = SamplingParams(temperature=0.0, max_tokens=4, logits_processors=[lambda ids, logits: twice(logits)])

    def twice(logits: torch.Tensor) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return logits

    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2]], asking, use_tqdm=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(tokens(llm, PROMPTS)) == len(PROMPTS)


@pytest.mark.parametrize("where", ["_plan", "_land", "finish"])
def test_ctrl_c_in_the_middle_of_the_books_is_heard_when_they_agree(llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    expected, scheduler = tokens(llm, PROMPTS), llm.llm_engine.engine.scheduler
    original, times = getattr(scheduler, where), iter(range(100))

    def interrupted(*args: object, **kwargs: object) -> object:
        if next(times) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    iterator = llm.generate_iter(PROMPTS, GREEDY)
    monkeypatch.setattr(scheduler, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(iterator) if where != "finish" else [next(iterator), iterator.close()]
    scheduler.check_integrity()
    assert not llm.llm_engine.has_work
    assert tokens(llm, PROMPTS) == expected


def test_what_tears_the_books_is_said_ever_after(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def alarm(*args: object, **kwargs: object) -> object:
        raise SystemExit

    monkeypatch.setattr(llm.llm_engine.engine.scheduler, "_land", alarm)
    with pytest.raises(SystemExit):
        tokens(llm, PROMPTS)
    with pytest.raises(EngineStateError, match="close this engine and make a new one"):
        tokens(llm, PROMPTS)


def test_a_handler_that_is_set_during_a_step_stays(llm: LLM) -> None:
    heard: list[int] = []

    def processor(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
        return logits

    before = signal.getsignal(signal.SIGINT)
    try:
        tokens(llm, [[1]], SamplingParams(temperature=0.0, max_tokens=1, logits_processors=[processor]))
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
