"""One test a parameter that names a class, or that adds to what an engine tells."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import structlog
import torch
from parameter_helpers import engine, run, scores, token_ids
from structlog.testing import capture_logs

from kvloom import SamplingParams
from kvloom.errors import ConfigError
from kvloom.interfaces import LogitsProcessor, SchedulingPolicy, StepStats
from kvloom.runtime.worker import DeviceWorker
from kvloom.stats_log import INTERVAL_S, StatsLog


class NewestFirst(SchedulingPolicy):
    """The newest request first."""

    def sort_key(self, request: Any) -> tuple[float, ...]:
        return (-request.sequence_id,)


class CountingWorker(DeviceWorker):
    """Counts its steps."""

    steps = 0

    def execute(self, step: Any) -> Any:
        self.steps += 1
        return super().execute(step)


class Extension:
    """What scripts for reinforcement learning add."""

    def scale_weights(self, factor: float) -> int:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(factor)
        return self.rank


class Clash:
    """Has a method that workers have."""

    def execute(self, step: Any) -> Any: ...


class Always(LogitsProcessor):
    """Requests with the seed 99 only get the token 7."""

    @classmethod
    def parameters(cls, params: SamplingParams, tokenizer: Any) -> int | None:
        return 7 if params.seed == 99 else None

    def new_state(self, parameters: Any, sequence: Any) -> Any:
        return parameters

    def apply(self, logits: torch.Tensor, states: Any) -> torch.Tensor:
        for row, token_id in enumerate(states):
            logits[row, token_id] = 1e9
        return logits


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    """These classes as a module that can be named."""
    made = ModuleType("acme_classes")
    for cls in (NewestFirst, CountingWorker, Extension, Clash, Always):
        setattr(made, cls.__name__, cls)
    made.not_a_class = 3
    monkeypatch.setitem(sys.modules, "acme_classes", made)


@pytest.mark.parametrize("given", [NewestFirst, "acme_classes:NewestFirst", "acme_classes.NewestFirst"])
def test_scheduler_cls__is_a_policy_or_where_it_is(small_checkpoint: Path, given: Any) -> None:
    with engine(small_checkpoint, scheduler_cls=given, max_num_seqs=1) as llm:
        outputs = run(llm, [[1], [2], [3]])
    assert sorted(range(3), key=lambda i: outputs[i].metrics.finished_time) == [2, 1, 0]


@pytest.mark.parametrize("name", ["scheduler_cls", "worker_cls", "worker_extension_cls"])
@pytest.mark.parametrize(("given", "message"), [
    ("acme_classes:Missing", "cannot be loaded: AttributeError"), ("no_such_module:Class", "cannot be loaded: ModuleNotFoundError"),
    ("acme_classes:not_a_class", "must be a"),
])
def test_class_parameters__that_name_nothing_are_refused(small_checkpoint: Path, name: str, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='{given}' {message}"):
        engine(small_checkpoint, **{name: given})


@pytest.mark.parametrize(("name", "wanted"), [("scheduler_cls", "SchedulingPolicy"), ("worker_cls", "DeviceWorker")])
def test_class_parameters__of_another_kind_are_refused(small_checkpoint: Path, name: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*must be a subclass of kvloom.*{wanted}"):
        engine(small_checkpoint, **{name: Extension})


@pytest.mark.parametrize("given", [CountingWorker, "acme_classes:CountingWorker"])
def test_worker_cls__makes_the_workers(small_checkpoint: Path, given: Any) -> None:
    with engine(small_checkpoint) as plain, engine(small_checkpoint, worker_cls="auto") as auto, engine(small_checkpoint, worker_cls=given) as llm:
        assert scores(plain) == scores(auto) == scores(llm)
        assert llm.collective_rpc(lambda worker: worker.steps) == [6]


@pytest.mark.parametrize("given", [Extension, "acme_classes:Extension", "acme_classes.Extension"])
def test_worker_extension_cls__adds_methods_that_collective_rpc_calls(small_checkpoint: Path, given: Any) -> None:
    with engine(small_checkpoint) as plain, engine(small_checkpoint, worker_extension_cls=given, worker_cls=CountingWorker) as llm:
        before = scores(llm)
        assert before == scores(plain)
        assert llm.collective_rpc("scale_weights", args=(0.5,)) == [0]
        llm.reset_prefix_cache()
        assert scores(llm) != before
        with pytest.raises(AttributeError):
            plain.collective_rpc("scale_weights", args=(0.5,))


def test_worker_extension_cls__may_not_replace_what_workers_have(small_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="worker_extension_cls=.*has execute, which workers have already"):
        engine(small_checkpoint, worker_extension_cls=Clash)
    with engine(small_checkpoint, worker_extension_cls="") as llm:
        assert len(scores(llm)[0]) == 6


@pytest.mark.parametrize("given", [[Always], ["acme_classes:Always"], ("acme_classes.Always",)])
def test_logits_processors__of_the_engine_run_for_requests_that_ask(small_checkpoint: Path, given: Any) -> None:
    asking, plain_params = SamplingParams(seed=99, max_tokens=2, ignore_eos=True), SamplingParams(seed=1, max_tokens=2, ignore_eos=True)
    with engine(small_checkpoint) as plain, engine(small_checkpoint, logits_processors=given) as llm:
        asked, not_asked = token_ids(run(llm, [[1], [1]], [asking, plain_params]))
        assert asked == [7, 7]
        assert not_asked == token_ids(run(plain, [[1], [1]], [asking, plain_params]))[1]


@pytest.mark.parametrize(("given", "message"), [
    ([Extension], r"logits_processors\[0\]=.*subclass of .*LogitsProcessor"), ([Always, "acme_classes:Always"], r"logits_processors\[1\]=.*twice"),
    (["acme_classes:Missing"], "cannot be loaded"),
])
def test_logits_processors__that_are_none_are_refused(small_checkpoint: Path, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine(small_checkpoint, logits_processors=given)


def events(name: str, logs: list) -> list:
    return [entry for entry in logs if entry["event"] == name]


def test_disable_log_stats__false_logs_throughput_when_the_work_is_done(small_checkpoint: Path) -> None:
    with capture_logs() as logs:
        for given, count in ((True, 0), (False, 2)):
            with engine(small_checkpoint, disable_log_stats=given) as llm:
                assert scores(llm) == scores(llm)
                assert run(llm, [[1]])[0].metrics.finished_time > 0
            found = events("engine stats", logs)
            assert len(found) == (0 if count == 0 else 3)
    structlog.reset_defaults()
    assert [entry["tokens"] for entry in found] == [49 + 5, 1 + 5, 1 + 5]  # the second finds 48 tokens in the cache
    assert {(entry["running"], entry["waiting"], entry["preempted"]) for entry in found} == {(0, 0, 0)}
    assert all(entry["tokens_per_s"] > 0 for entry in found)


def test_disable_log_stats__false_logs_every_ten_seconds_of_work() -> None:
    now_s = 100.0
    with capture_logs() as logs:
        log = StatsLog(lambda: now_s)
        for i in range(25):
            now_s += 1.0
            log(StepStats(i, 8, 2, 1, 1 if i == 3 else 0, 6, 8, 0.5))
    structlog.reset_defaults()
    assert INTERVAL_S == 10.0
    assert [(e["steps"], e["tokens"], e["tokens_per_s"], e["preempted"], e["kv_cache_used"]) for e in logs] == [
        (10, 80, 16.0, 1, 0.25), (10, 80, 16.0, 0, 0.25)]
