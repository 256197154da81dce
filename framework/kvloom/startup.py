"""From a configuration to a running engine: plugins, model files, worker, KV cache, tokenizer, scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvloom.config import EngineConfig
from kvloom.config.class_path import make_instance
from kvloom.config.other_values import instead
from kvloom.config.pooling import PoolingPlan
from kvloom.core import Engine, Scheduler, StepObserver
from kvloom.errors import ConfigError, ManifestMismatchError, NotRegisteredError, RequestValidationError, shown
from kvloom.hooks.loader import PluginSet, load_plugins
from kvloom.interfaces import Executor, SchedulingPolicy, Tokenizer, Worker, WorkerFactory, WorkerReport
from kvloom.logs import get_logger
from kvloom.pooling_rules import PoolingRules
from kvloom.request_rules import EndTokens, RequestRules
from kvloom.running import RunningEngine
from kvloom.runtime.host_memory import host_memory
from kvloom.start_report import PhaseTimer, StartReport
from kvloom.stats_log import StatsLog
from kvloom.text.chat import read_template
from kvloom.text.grammar_gate import GrammarGate, find_grammar, open_gate
from kvloom.text.templates import TemplateRenderer
from kvloom.text.tokenizer import import_tokenizer, open_tokenizer
from kvloom.torch_import import import_torch

if TYPE_CHECKING:
    from kvloom.runtime.builder import ModelSource


def load_config_plugins(config: EngineConfig) -> PluginSet:
    """The plugins that a configuration selects."""
    return load_plugins(config.selection, config.plugins.plugin_config, config.plugins.providers)


def start_engine(config: EngineConfig, timer: PhaseTimer) -> RunningEngine:
    """Build everything. When something raises, what was built before is given back.

    Args:
        timer: made when the start began.

    Raises:
        ConfigError, ModelError, PluginError: see `kvloom.errors`.
    """
    _log_notes(config)
    with timer.phase("plugins"):
        plugins = load_config_plugins(config)
    with timer.phase("import torch"):
        torch_notes = import_torch()
        from kvloom.layers.base import dtype_name
        from kvloom.runtime import builder, logits, worker, worker_class
    with timer.phase("import tokenizer"):
        tokenizer_class = import_tokenizer(config, plugins.registries["tokenizers"])
    with timer.phase("model files"):
        source = builder.open_source(config, plugins)
    with timer.phase("tokenizer"):
        tokenizer, grammars = _open_text(config, plugins, source, tokenizer_class)
    policy = _policy(config, plugins)
    pipeline = logits.LogitsPipeline(logits.make_processors(plugins.registries["logits_processors"],
                                                            config.features.logits_processors or ()))
    make = worker_class.worker_class(config.device)
    executor: Executor = _component(plugins, "executors", "distributed_executor_backend",
                                    config.device.distributed_executor_backend)()

    def make_worker(rank: int) -> Worker:
        return make(rank, config, plugins, source, None if grammars is None else grammars.make_vocabulary)

    try:
        with timer.phase("worker") as parts:
            report = _start_worker(executor, make_worker, plugins)
            parts += report.timings_s
        with timer.phase("KV cache"):
            executor.allocate(report.num_blocks)
        with timer.phase("scheduler"):
            plan = executor.call(worker.worker_plan)[0]
            limits = config.limits(source.max_model_len, chunkable=executor.call(_chunkable)[0])
            scheduler = Scheduler(limits, report.groups, report.num_blocks, policy, report.host_tier)
            engine = Engine(scheduler, executor, _observers(config, plugins))
            rules = RequestRules(
                config.model.seed, str(source.directory), source.config.vocab_size, source.max_model_len, config.features.max_logprobs,
                limits.cached, EndTokens.of(source.end_token_ids, tokenizer), tokenizer, pipeline, executor.call(_extra_inputs)[0],
                grammars, _pooling_rules(plugins, source.pooling, executor, source.config.vocab_size))
        notes = (f"task: {source.task}", f"device: {source.device.describe()}", f"dtype: {dtype_name(source.dtype)}", *report.notes,
                 *torch_notes, *plugins.notes)
        start = StartReport(tuple(timer.phases), timer.elapsed_s, plan.num_blocks, plan.capacity_tokens, notes)
        running = RunningEngine(config, engine, executor, plugins, rules, source.defaults, plan, start, source.device.names)
    except BaseException:
        executor.close()
        raise
    start.log(running.model_name)
    running.announce()
    return running


def _log_notes(config: EngineConfig) -> None:
    """What is to be said about the configuration. Raises `ConfigError` when this host is too small for it."""
    for note in (*config.notes, *config.model.in_vain):
        get_logger().info("configuration", note=note)
    if "swap_space" in config.origins:
        warning = config.cache.swap_space_note(host_memory().total_bytes)
        if warning is not None:
            get_logger().warning("configuration", note=warning)


def _open_text(config: EngineConfig, plugins: PluginSet, source: ModelSource,
               tokenizer_class: type[Tokenizer] | None) -> tuple[Tokenizer | None, GrammarGate | None]:
    """The tokenizer and what makes grammars; what is wrong about grammars and templates is said without a tokenizer, too."""
    tokenizer = None if tokenizer_class is None else open_tokenizer(config, source.directory, tokenizer_class)
    _check_chat_template(config.model.chat_template)
    find_grammar(config.features.guided_decoding_backend, plugins)
    if tokenizer is None:
        return None, None
    return tokenizer, open_gate(config, plugins, tokenizer, source.config.vocab_size, source.end_token_ids)


def _start_worker(executor: Executor, make_worker: WorkerFactory, plugins: PluginSet) -> WorkerReport:
    """Of its only rank. Raises `ManifestMismatchError` when that found other plugins."""
    report = executor.start(make_worker, 1)[0]
    if report.manifest_hash != plugins.manifest.hash:
        raise ManifestMismatchError(f"worker {report.rank} resolved other plugins than the engine; use one installation for both")
    return report


def _observers(config: EngineConfig, plugins: PluginSet) -> list[StepObserver]:
    found = [observe for _, observe in plugins.observers["kvloom_step_finished"]]
    return found if config.features.disable_log_stats else [*found, StatsLog()]


def _check_chat_template(given: str | None) -> None:
    """Raises `ConfigError` for one that no conversation could be rendered with."""
    if given is None:
        return
    renderer = TemplateRenderer()
    try:
        renderer.check(read_template(given))
    except RequestValidationError as error:
        raise ConfigError(f"chat_template={shown(given)}: {error}") from error
    finally:
        renderer.close()


def _chunkable(worker: Any) -> bool:
    return bool(worker.model.chunkable)


def _extra_inputs(worker: Any) -> dict[str, int]:
    return dict(worker.model.extra_inputs)


def _pooling_rules(plugins: PluginSet, plan: PoolingPlan | None, executor: Executor, vocab_size: int) -> PoolingRules | None:
    from kvloom.runtime.pooling import make_poolers, model_pooling

    if plan is None:
        return None
    rules = PoolingRules(make_poolers(plugins, plan, executor.call(model_pooling)[0]))
    try:
        rules.check_defaults(vocab_size)
    except RequestValidationError as error:
        raise ConfigError(f"override_pooler_config: {error}") from error
    return rules


def _policy(config: EngineConfig, plugins: PluginSet) -> SchedulingPolicy:
    given = config.scheduler.scheduler_cls
    if given is not None:
        policy: SchedulingPolicy = make_instance("scheduler_cls", given, SchedulingPolicy)
        return policy
    policy = _component(plugins, "schedulers", "scheduling_policy", config.scheduler.scheduling_policy)()
    return policy


def _component(plugins: PluginSet, kind: str, parameter: str, name: str) -> Any:
    """The class that a parameter names. Raises `ConfigError` that names the parameter."""
    try:
        return plugins.registries[kind].resolve(name).load()
    except NotRegisteredError as error:
        raise ConfigError(f"{parameter}={name!r}{instead(parameter, name)}: {error}") from error
