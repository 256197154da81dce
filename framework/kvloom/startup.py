"""From a configuration to a running engine: plugins, model files, worker, KV cache, tokenizer, scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvloom.config import EngineConfig
from kvloom.core import Engine, Scheduler, root_digest
from kvloom.errors import ConfigError, ManifestMismatchError, NotRegisteredError
from kvloom.hooks.loader import PluginSet, load_plugins
from kvloom.interfaces import Executor, Worker, WorkerReport
from kvloom.logs import get_logger
from kvloom.running import RequestRules, RunningEngine
from kvloom.start_report import PhaseTimer, StartReport
from kvloom.text.tokenizer import import_tokenizer, open_tokenizer


def load_config_plugins(config: EngineConfig) -> PluginSet:
    """The plugins that a configuration selects."""
    return load_plugins(config.selection, config.plugins.plugin_config, config.plugins.providers)


def start_engine(config: EngineConfig) -> RunningEngine:
    """Build everything. When something raises, what was built before is given back.

    Raises:
        ConfigError, ModelError, PluginError: see `kvloom.errors`.
    """
    for note in config.notes:
        get_logger().info("configuration", note=note)
    timer = PhaseTimer()
    with timer.phase("plugins"):
        plugins = load_config_plugins(config)
    with timer.phase("import torch"):
        from kvloom.layers.base import dtype_name
        from kvloom.runtime import builder, logits, worker
    with timer.phase("import tokenizer"):
        tokenizer_class = import_tokenizer(config, plugins.registries["tokenizers"])
    with timer.phase("model files"):
        source = builder.open_source(config, plugins)
    with timer.phase("tokenizer"):
        tokenizer = None if tokenizer_class is None else open_tokenizer(config, source.directory, tokenizer_class)
    policy = _component(plugins, "schedulers", "scheduling_policy", config.scheduler.scheduling_policy)()
    executor: Executor = _component(plugins, "executors", "distributed_executor_backend",
                                    config.device.distributed_executor_backend)()

    def make_worker(rank: int) -> Worker:
        return worker.DeviceWorker(rank, config, plugins, source)

    try:
        report = executor.start(make_worker, 1)[0]
        if report.manifest_hash != plugins.manifest.hash:
            raise ManifestMismatchError(f"worker {report.rank} resolved other plugins than the engine; use one installation for both")
        with timer.phase("KV cache"):
            executor.allocate(report.num_blocks)
        plan = executor.call(worker.worker_plan)[0]
        limits = config.limits(source.max_model_len, chunkable=executor.call(_chunkable)[0])
        observers = [observe for _, observe in plugins.observers["kvloom_step_finished"]]
        engine = Engine(Scheduler(limits, report.groups, report.num_blocks, policy), executor, observers)
        rules = RequestRules.of(config.model.seed, source.config.vocab_size, source.end_token_ids, tokenizer,
                                root_digest(str(source.directory)))
        pipeline = logits.LogitsPipeline(logits.make_processors(plugins.registries["logits_processors"]))
        running = RunningEngine(config, engine, executor, plugins, tokenizer, rules, pipeline, plan,
                                _report(timer, report, plugins, dtype_name(source.dtype)))
    except BaseException:
        executor.close()
        raise
    running.announce()
    return running


def _chunkable(worker: Any) -> bool:
    return bool(worker.model.chunkable)


def _component(plugins: PluginSet, kind: str, parameter: str, name: str) -> Any:
    """The class that a parameter names. Raises `ConfigError` that names the parameter."""
    try:
        return plugins.registries[kind].resolve(name).load()
    except NotRegisteredError as error:
        raise ConfigError(f"{parameter}={name!r}: {error}") from error


def _report(timer: PhaseTimer, report: WorkerReport, plugins: PluginSet, dtype: str) -> StartReport:
    import torch

    threads = f"threads: {torch.get_num_threads()}"
    for note in report.notes:
        get_logger().info("worker", note=note)
    phases: Mapping[str, float] = dict([*timer.phases, *report.timings_s])
    return StartReport(tuple(phases.items()), (f"dtype: {dtype}", threads, *report.notes, *plugins.notes))
