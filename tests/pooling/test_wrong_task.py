"""Every method of `LLM` in an engine of every task: it works, or one kind of error says what this engine is for and how to make the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pooling_helpers import as_reward_model, engine, make, write_tokenizer

from kvloom import LLM, BeamSearchParams, SamplingParams
from kvloom.errors import ConfigError, RequestValidationError
from kvloom.wrong_task import METHODS

PROMPT = [5, 6, 7]
QUIET = {"use_tqdm": False}
TEMPLATE = "{{ messages[0].content }}"
CALLS: dict[str, Callable[[LLM, Any], Any]] = {
    "generate": lambda llm, p: llm.generate(p, SamplingParams(max_tokens=2), **QUIET),
    "generate_iter": lambda llm, p: list(llm.generate_iter(p, SamplingParams(max_tokens=2))),
    "chat": lambda llm, p: llm.chat([[{"role": "user", "content": "w5"}] for _ in p], SamplingParams(max_tokens=2), chat_template=TEMPLATE, **QUIET),
    "beam_search": lambda llm, p: llm.beam_search(p, BeamSearchParams(2, 2)),
    "encode": lambda llm, p: llm.encode(p, **QUIET), "embed": lambda llm, p: llm.embed(p, **QUIET), "classify": lambda llm, p: llm.classify(p, **QUIET),
    "reward": lambda llm, p: llm.reward(p, **QUIET), "score": lambda llm, p: llm.score(["w5"] * len(p), ["w6"] * len(p), **QUIET),
}
GENERATING, EMBEDDING = {"generate", "generate_iter", "chat", "beam_search"}, {"encode", "embed", "score"}
LABELS, ONE_LABEL, REWARDS = {"encode", "classify"}, {"encode", "classify", "score"}, {"encode", "reward"}
ENGINES: list[tuple[str, dict[str, str], str, set[str]]] = [
    ("decoder", {}, "generate", GENERATING), ("decoder", {"task": "generate"}, "generate", GENERATING), ("decoder", {"runner": "generate"}, "generate", GENERATING),
    ("decoder", {"convert": "none"}, "generate", GENERATING), ("decoder", {"task": "embed"}, "embed", EMBEDDING), ("decoder", {"task": "pooling"}, "embed", EMBEDDING),
    ("decoder", {"runner": "pooling"}, "embed", EMBEDDING), ("decoder", {"convert": "embed"}, "embed", EMBEDDING),
    ("decoder", {"runner": "pooling", "convert": "none"}, "embed", EMBEDDING), ("decoder", {"task": "embedding"}, "embed", EMBEDDING),
    ("labels", {}, "classify", LABELS), ("labels", {"runner": "pooling"}, "classify", LABELS), ("labels", {"convert": "classify"}, "classify", LABELS),
    ("cross", {}, "classify", ONE_LABEL), ("cross", {"task": "score"}, "score", ONE_LABEL),
    ("reward", {}, "reward", REWARDS), ("reward", {"convert": "reward"}, "reward", REWARDS),
]
IMPOSSIBLE = [("decoder", "classify"), ("decoder", "score"), ("decoder", "reward"), ("labels", "generate"), ("labels", "embed"), ("labels", "score"),
              ("labels", "reward"), ("cross", "generate"), ("reward", "classify"), ("reward", "generate")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in ("decoder", "labels", "cross", "reward")}
    make(found["decoder"])
    make(found["labels"], kind="ForSequenceClassification", num_labels=3)
    make(found["cross"], kind="ForSequenceClassification", num_labels=1)
    make(found["reward"], "Qwen2", "ForTokenClassification", num_labels=1)
    for directory in found.values():
        write_tokenizer(directory)
    as_reward_model(found["reward"])
    return found


@pytest.mark.parametrize(("name", "arguments", "task", "has"), ENGINES, ids=lambda value: str(value) if isinstance(value, str | dict) else "")
def test_an_engine_has_the_methods_of_its_task_and_says_so_of_the_others(checkpoints, name: str, arguments: dict, task: str, has: set[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        made = engine(checkpoints[name], skip_tokenizer_init=False, **arguments)
    assert set(CALLS) == set(METHODS)
    with made as llm:
        assert llm.llm_engine.rules.task == task
        for method, call in CALLS.items():
            if method in has:
                assert len(call(llm, [PROMPT])) == 1, method
                continue
            with pytest.raises(RequestValidationError) as caught:
                call(llm, [PROMPT])
            message = str(caught.value)
            if (name, method) == ("labels", "score"):
                assert "needs a model with one label, this one has 3; use classify" in message
            else:
                assert f"LLM.{method}() is only supported for" in message
                assert f"this engine runs with task={task!r} and has {', '.join(m for m in METHODS if task in METHODS[m].tasks)}." in message
                assert f"Make an LLM with task={METHODS[method].tasks[0]!r}" in message
                assert caught.value.value == task
            assert caught.value.parameter == "task"
        assert not llm.llm_engine.has_work
        assert all(len(CALLS[method](llm, [PROMPT])) == 1 for method in has)


@pytest.mark.parametrize(("name", "arguments"), [("decoder", {}), ("decoder", {"task": "embed"})], ids=str)
def test_a_wrong_method_is_refused_whatever_the_prompts_and_whatever_on_error_says(checkpoints, name: str, arguments: dict) -> None:
    with engine(checkpoints[name], skip_tokenizer_init=False, **arguments) as llm:
        own = EMBEDDING if arguments else GENERATING
        for method in sorted(set(CALLS) - own):
            with pytest.raises(RequestValidationError, match="is only supported for"):
                CALLS[method](llm, [])
            if method != "generate_iter":
                first = ("w5", "w6") if method == "score" else ([PROMPT], BeamSearchParams(2, 2)) if method == "beam_search" else ([PROMPT],)
                with pytest.raises(RequestValidationError, match="is only supported for"):
                    getattr(llm, method)(*first, on_error="return")


@pytest.mark.parametrize(("name", "task"), IMPOSSIBLE)
def test_a_task_that_a_checkpoint_cannot_do_names_those_that_it_can_and_models_that_do(checkpoints, name: str, task: str) -> None:
    own = {"decoder": "'generate', 'embed'", "labels": "'classify'", "cross": "'classify', 'score'", "reward": "'reward'"}[name]
    with pytest.raises(ConfigError, match=rf"does not support the '{task}' task. Supported tasks: {{{own}}} .*; {task} needs a model of these: "):
        engine(checkpoints[name], task=task)


def test_a_score_of_several_labels_is_refused_through_encode_too(checkpoints) -> None:
    with engine(checkpoints["labels"]) as llm, pytest.raises(RequestValidationError, match="requests may be for classify, token_classify; got 'score'"):
        llm.encode([PROMPT], pooling_task="score", **QUIET)
