"""One rank: plans memory, builds and loads its model, and runs steps on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvloom.config import EngineConfig
from kvloom.core import SchedulerLimits
from kvloom.errors import EngineStateError, InternalError, MemoryPlanError, RequestError
from kvloom.hooks.loader import PluginSet
from kvloom.interfaces import (
    Grammar,
    GrammarVocabulary,
    HostTierReport,
    Model,
    NewSequence,
    SequenceView,
    Step,
    StepResult,
    WorkerReport,
)
from kvloom.interfaces.attention import LayerCache
from kvloom.runtime.batch import BatchState
from kvloom.runtime.builder import BuiltModel, ModelSource, build_model
from kvloom.runtime.comm import LocalComm
from kvloom.runtime.dense import DenseLayers
from kvloom.runtime.forward import Forward, LayerState
from kvloom.runtime.grammar import GrammarFactory
from kvloom.runtime.host_blocks import HostBlocks
from kvloom.runtime.kv_tensors import LayerShapes, allocate, copy_blocks
from kvloom.runtime.logits import NO_PROCESSORS, LogitsPipeline, SequenceProcessors, make_processors
from kvloom.runtime.memory import MemoryPlan, plan_memory, recorded_step_bytes, scratch_bytes
from kvloom.runtime.model_plan import make_loader, plan_model
from kvloom.runtime.offload import HostWeights, layers_to_offload, offload, weights_of
from kvloom.runtime.peak import largest_step
from kvloom.runtime.pooling import PoolingState, RowPooler, make_poolers, model_pooling
from kvloom.runtime.profiling import WorkerProfiler
from kvloom.runtime.runner import Runner
from kvloom.runtime.tables import SequenceTables
from kvloom.runtime.threads import choose_threads
from kvloom.runtime.weights import load_weights
from kvloom.text.grammar_gate import find_grammar
from kvloom.text.vocabulary import open_vocabulary

DEFAULT_SAMPLER = "default"


@dataclass(frozen=True, slots=True)
class HostLink:
    """How a device with memory of its own is reached from the host.

    Args:
        bytes_per_s: one way.
        tokens_per_s: that the device computes in a prompt.
    """

    bytes_per_s: float
    tokens_per_s: float


class DeviceWorker:
    """See `kvloom.interfaces.Worker`. One rank, in this process, on the source's device.

    Attributes:
        host_link: None where the device is the host itself: then blocks that gave way are recomputed, all weights stay where they are,
            and level 1 of sleep has none to move. To be set before `load`.

    Args:
        make_vocabulary: for grammars, called with the first one; None opens the tokenizer again.
    """

    def __init__(self, rank: int, config: EngineConfig, plugins: PluginSet, source: ModelSource,
                 make_vocabulary: Callable[[], GrammarVocabulary] | None = None) -> None:
        self.rank = rank
        self._make_vocabulary = make_vocabulary or self._open_vocabulary
        self._config, self._plugins, self._source = config, plugins, source
        self._grammars = self._make_grammars()
        self._device = source.device
        self._comm = LocalComm()
        self._plan: MemoryPlan | None = None
        self._built: BuiltModel | None = None
        self.host_link: HostLink | None = None
        self._num_blocks = 0
        self._shapes: LayerShapes = {}
        self._caches: Mapping[int, LayerCache] | None = None
        self._runner: Runner | None = None
        self._aside: HostWeights | None = None
        self._profiler = WorkerProfiler(rank)

    @property
    def model(self) -> Model:
        """The torch module. Raises `EngineStateError` while its weights are dropped."""
        return self._model().model

    @property
    def held_bytes(self) -> int:
        """See `Worker.held_bytes`."""
        return self._device.memory().own_bytes

    @property
    def plan(self) -> MemoryPlan:
        """The memory plan. After `load` only."""
        if self._plan is None:
            raise InternalError("the worker has not loaded its model yet")
        return self._plan

    def load(self) -> WorkerReport:
        """See `Worker.load`: first the plan, which refuses what does not fit, then everything of the model's size.

        Raises:
            MemoryPlanError: it does not fit.
            CheckpointError: the files do not hold what the model needs.
        """
        began = time.perf_counter()
        threads, kernels = choose_threads(), self._device.kernels()
        started = time.perf_counter()
        self._plan, _ = plan_model(self._config, self._plugins, self._source, is_host=self._is_host)
        self._plan.check()
        planned = time.perf_counter()
        with _no_memory_is_a_plan_error():
            notes = (threads, kernels, *self._load_model())
        loaded = time.perf_counter()
        timings = [("kernels", started - began), ("memory plan", planned - started), ("weights", loaded - planned)]
        if self._device.profiles:
            with self._device.current(), _no_memory_is_a_plan_error():
                self._plan = self._measured_plan(self._plan)
            self._plan.check()
            timings.append(("largest step", time.perf_counter() - loaded))
        return WorkerReport(self.rank, self._plan.needs.groups, self._plan.num_blocks, self._plugins.manifest.hash, tuple(timings),
                            notes, self._host_tier())

    @property
    def _is_host(self) -> bool:
        return self._device.is_host and self.host_link is None

    def _measured_plan(self, plan: MemoryPlan) -> MemoryPlan:
        """With what the largest step takes in place of the estimate. Its time also says what computing a block again costs."""
        step = largest_step(self._model(), self._source, self._config, plan.needs.groups, self._comm)
        measured = self._device.measure(step.run)
        if self.host_link is None:
            self.host_link = HostLink(self._device.host_bytes_per_s(), step.tokens / measured.seconds)
        return plan_memory(replace(plan.needs, activations_bytes=measured.peak_bytes), plan.memory)

    def _load_model(self) -> tuple[str, ...]:
        """Build the model and read its weights; lines for the start report."""
        built = build_model(self._config, self._plugins, self._source, self._device.torch_device, self._comm)
        loaded = load_weights(built.model, make_loader(self._config, self._plugins), self._source.directory)
        notes = [*built.notes, f"weights: {loaded.num_tensors} tensors, {loaded.size_bytes} bytes"]
        if loaded.ignored:
            notes.append(f"ignored tensors: {', '.join(loaded.ignored)}")
        if not self._is_host and self._config.cache.cpu_offload_bytes:
            kept_bytes = offload(layers_to_offload(built.model, self._config.cache.cpu_offload_bytes), self._device.torch_device)
            notes.append(f"weights kept on the host: {kept_bytes} bytes")
        self._built = built
        return tuple(notes)

    def _host_tier(self) -> HostTierReport | None:
        block_bytes = self.plan.needs.block_bytes
        if self.host_link is None or not block_bytes:
            return None
        return HostTierReport(self._config.cache.swap_space_bytes // block_bytes, block_bytes, self.host_link.bytes_per_s,
                              self.host_link.tokens_per_s)

    def allocate(self, num_blocks: int) -> None:
        """See `Worker.allocate`."""
        built, groups = self._model(), self.plan.needs.groups
        self._num_blocks = num_blocks
        self._shapes = {layer: built.backends[layer].state_shapes() for group in groups for layer in group.layers}
        with _no_memory_is_a_plan_error():
            self._caches = allocate(groups, self._shapes, num_blocks, self._device.torch_device)
            self._make_runner(built, self._caches)

    def _make_runner(self, built: BuiltModel, caches: Mapping[int, LayerCache]) -> None:
        """All that is remembered of sequences, which is nothing."""
        groups = self.plan.needs.groups
        limits = self._config.limits(self._source.max_model_len, chunkable=built.model.chunkable)
        sampler = self._plugins.registries["samplers"].resolve(DEFAULT_SAMPLER).load()()
        pipeline = LogitsPipeline(make_processors(self._plugins.registries["logits_processors"],
                                                  self._config.features.logits_processors or ()))
        self._grammars = self._make_grammars()
        pooler = self._make_pooler(built.model)
        tables = SequenceTables(self._device, limits.max_num_seqs, limits.max_model_len, groups, tuple(built.model.extra_inputs))
        state = BatchState(tables, lambda new: self._start(pipeline, new), lambda copies: copy_blocks(groups, caches, copies),
                           lambda new: _start_pooling(pooler, new))
        tier = self._host_tier()
        host_blocks = HostBlocks(groups, caches, tier.num_blocks) if tier is not None and tier.num_blocks else None
        self._runner = Runner(built.model, self._forward(built, caches, tables, limits), sampler, pipeline, state, host_blocks, pooler)

    def _forward(self, built: BuiltModel, caches: Mapping[int, LayerCache], tables: SequenceTables, limits: SchedulerLimits) -> Forward:
        layers = LayerState(self.plan.needs.groups, len(built.model.state_specs()), built.backends, caches)
        config, dtype = self._source.config, self._source.dtype
        return Forward(built.model, self._comm, layers, tables, self._device,
                       max_num_seqs=limits.max_num_seqs, max_model_len=limits.max_model_len,
                       max_num_batched_tokens=limits.max_num_batched_tokens,
                       recorded_bytes=recorded_step_bytes(self._config, self._source, limits.max_num_seqs),
                       scratch_bytes=scratch_bytes(config, dtype, limits.max_num_batched_tokens))

    def _make_pooler(self, model: Model) -> RowPooler | None:
        plan, source = self._source.pooling, self._source
        if plan is None:
            return None
        dense = DenseLayers(plan.dense, lambda: make_loader(self._config, self._plugins), self._device.torch_device)
        return RowPooler(make_poolers(self._plugins, plan, model_pooling(self)), model, dense, source.dtype, source.config.hidden_size)

    def execute(self, step: Step) -> StepResult:
        """See `Worker.execute`."""
        if self._runner is None:
            raise InternalError("execute was called before allocate, or while the worker sleeps")
        with self._profiler.step(step.step_id), self._device.current():
            return self._runner.execute(step)

    def forget_recorded(self) -> None:
        """See `Worker.forget_recorded`."""
        if self._runner is not None:
            self._runner.forget_recorded()

    def set_vocabulary(self, make_vocabulary: Callable[[], GrammarVocabulary]) -> None:
        """See `Worker.set_vocabulary`."""
        self._make_vocabulary = make_vocabulary
        self._grammars = self._make_grammars()

    def sleep(self, level: int) -> None:
        """See `Worker.sleep`."""
        self._drop_runner()
        self._caches = None
        if level == 2:
            self._built = self._aside = None
        elif not self._is_host and self._aside is None:
            self._aside = HostWeights(weights_of(self._model().model), self._device.torch_device)
        self._device.release()

    def wake_up(self, tags: Sequence[str]) -> None:
        """See `Worker.wake_up`.

        Raises:
            MemoryPlanError: the memory was given to somebody else meanwhile.
        """
        with _no_memory_is_a_plan_error():
            self._wake_up(tags)

    def _wake_up(self, tags: Sequence[str]) -> None:
        if "weights" in tags and self._built is None:
            replace(self.plan, memory=self._device.memory()).check()
            self._load_model()
        if "weights" in tags and self._aside is not None:
            self._aside.fetch()
            self._aside = None
        if "kv_cache" in tags and self._caches is None:
            self._caches = allocate(self.plan.needs.groups, self._shapes, self._num_blocks, self._device.torch_device)
        if self._runner is None and self._built is not None and self._caches is not None:
            self._make_runner(self._built, self._caches)

    def start_profile(self, directory: str, prefix: str) -> None:
        """See `Worker.start_profile`."""
        self._profiler.start(Path(directory), prefix)

    def stop_profile(self) -> str:
        """See `Worker.stop_profile`."""
        return str(self._profiler.stop())

    def close(self) -> None:
        """See `Worker.close`."""
        self._profiler.close()
        self._drop_runner()
        self._caches = self._built = self._aside = None
        self._device.close()

    def _drop_runner(self) -> None:
        if self._runner is not None:
            self._runner.close()
        self._runner = None

    def _start(self, pipeline: LogitsPipeline, new: NewSequence) -> SequenceProcessors:
        """States of a sequence that comes. What a plugin raises is kept for its first row: the step goes on."""
        if new.sampling is None or not (new.processors or new.grammar):
            return NO_PROCESSORS
        prompt = new.token_ids[:new.prompt_tokens]
        view = SequenceView(new.sequence_id, new.sample_index, prompt, new.sampling, self._source.config.vocab_size, new.end_token_ids)
        try:
            grammar = self._grammars.start(new)
            return replace(pipeline.start(view, new.processors, new.token_ids[new.prompt_tokens:]), grammar=grammar)
        except RequestError as error:
            return SequenceProcessors({}, error)

    def _make_grammars(self) -> GrammarFactory:
        entry = find_grammar(self._config.features.guided_decoding_backend, self._plugins)

        def make(vocabulary: GrammarVocabulary) -> Grammar:
            return entry.load()(vocabulary)

        return GrammarFactory(f"{entry.name!r} ({entry.origin})", make, self._make_vocabulary)

    def _open_vocabulary(self) -> GrammarVocabulary:
        source = self._source
        return open_vocabulary(self._config, self._plugins, source.directory, source.config.vocab_size, source.end_token_ids)

    def _model(self) -> BuiltModel:
        if self._built is None:
            raise EngineStateError("the weights are not loaded: the engine sleeps; call wake_up()")
        return self._built


def _start_pooling(pooler: RowPooler | None, new: NewSequence) -> PoolingState | None:
    return None if pooler is None or new.pooling is None else pooler.start(new, new.pooling)


@contextmanager
def _no_memory_is_a_plan_error() -> Iterator[None]:
    """Planned memory of the device is not there: others took it, or a step takes more than was estimated."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryPlanError("the device has less free memory than was planned with: others took it meanwhile, or a step takes more "
                              f"than was estimated; free some, or lower max_num_batched_tokens. torch says: {error}") from error


def worker_plan(worker: Any) -> MemoryPlan:
    """For ``Executor.call``: a worker's plan."""
    plan: MemoryPlan = worker.plan
    return plan
