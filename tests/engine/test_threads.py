"""One engine used by several threads, which take turns step by step, and by what it calls itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvloom import LLM, SamplingParams
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
