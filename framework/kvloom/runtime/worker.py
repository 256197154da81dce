"""One rank: plans memory, builds and loads its model, and runs steps on it."""

from __future__ import annotations

import time
from typing import Any

import torch

from kvloom.config import EngineConfig
from kvloom.config.pooling import PoolingPlan
from kvloom.errors import InternalError, NotRegisteredError, RequestError
from kvloom.hooks.loader import PluginSet
from kvloom.interfaces import Model, NewSequence, SequenceView, Step, StepResult, WeightLoader, WorkerReport
from kvloom.runtime.batch import BatchState
from kvloom.runtime.builder import BuiltModel, ModelSource, build_model
from kvloom.runtime.comm import LocalComm
from kvloom.runtime.dense import DenseLayers
from kvloom.runtime.host_memory import host_memory
from kvloom.runtime.kv_tensors import allocate
from kvloom.runtime.logits import NO_PROCESSORS, LogitsPipeline, SequenceProcessors, make_processors
from kvloom.runtime.memory import MemoryPlan, memory_needs, plan_memory
from kvloom.runtime.pooling import PoolerSet, PoolingState, RowPooler
from kvloom.runtime.runner import Runner
from kvloom.runtime.weights import check_catalog, load_weights, wanted_infos, wanted_slots
from kvloom_kernels import native
from kvloom_kernels.linear import product_kind

DEFAULT_SAMPLER = "default"


def make_loader(config: EngineConfig, plugins: PluginSet) -> WeightLoader:
    """The weight loader that ``load_format`` names. Raises `NotRegisteredError`."""
    try:
        loader: WeightLoader = plugins.registries["loaders"].resolve(config.model.load_format).load()()
    except NotRegisteredError as error:
        raise NotRegisteredError(f"load_format={config.model.load_format!r}: {error}") from error
    return loader


def plan_model(config: EngineConfig, plugins: PluginSet, source: ModelSource) -> tuple[MemoryPlan, BuiltModel]:
    """The memory plan, from config.json and file headers alone; the model exists on the meta device only.

    Raises:
        CheckpointError: the files do not hold what the model needs.
    """
    built = build_model(config, plugins, source, torch.device("meta"), LocalComm())
    slots = wanted_slots(built.model)
    catalog = make_loader(config, plugins).catalog(source.directory, wanted_infos(slots))
    check_catalog(built.model, slots, catalog, source.directory)
    return plan_memory(memory_needs(config, source, built), host_memory()), built


class DeviceWorker:
    """See `kvloom.interfaces.Worker`. One rank, in this process, on the CPU."""

    def __init__(self, rank: int, config: EngineConfig, plugins: PluginSet, source: ModelSource) -> None:
        self.rank = rank
        self._config, self._plugins, self._source = config, plugins, source
        self._device = torch.device("cpu")
        self._comm = LocalComm()
        self._plan: MemoryPlan | None = None
        self._built: BuiltModel | None = None
        self._runner: Runner | None = None

    @property
    def model(self) -> Model:
        """The torch module."""
        return self._model().model

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
        kernels = _kernels_note()
        started = time.perf_counter()
        self._plan, _ = plan_model(self._config, self._plugins, self._source)
        self._plan.check()
        planned = time.perf_counter()
        built = build_model(self._config, self._plugins, self._source, self._device, self._comm)
        loaded = load_weights(built.model, make_loader(self._config, self._plugins), self._source.directory)
        self._built = built
        done = time.perf_counter()
        notes = (kernels, *built.notes, f"weights: {loaded.num_tensors} tensors, {loaded.size_bytes} bytes",
                 *([f"ignored tensors: {', '.join(loaded.ignored)}"] if loaded.ignored else []))
        return WorkerReport(self.rank, self._plan.needs.groups, self._plan.num_blocks, self._plugins.manifest.hash,
                            (("kernels", started - began), ("memory plan", planned - started), ("weights", done - planned)), notes)

    def allocate(self, num_blocks: int) -> None:
        """See `Worker.allocate`."""
        built, groups = self._model(), self.plan.needs.groups
        limits = self._config.limits(self._source.max_model_len, chunkable=built.model.chunkable)
        shapes = {layer: built.backends[layer].state_shapes() for group in groups for layer in group.layers}
        caches = allocate(groups, shapes, num_blocks, self._device)
        sampler = self._plugins.registries["samplers"].resolve(DEFAULT_SAMPLER).load()()
        pipeline = LogitsPipeline(make_processors(self._plugins.registries["logits_processors"]))
        vocab_size = self._source.config.vocab_size
        pooler = self._make_pooler(built.model)
        state = BatchState(limits.max_num_seqs, limits.max_model_len, groups, lambda new: _start(pipeline, new, vocab_size),
                           tuple(built.model.extra_inputs), lambda new: _start_pooling(pooler, new))
        num_layers = len(built.model.state_specs())
        self._runner = Runner(built.model, sampler, pipeline, self._comm, groups, num_layers, built.backends, caches,
                              state, self._device, pooler)

    def _make_pooler(self, model: Model) -> RowPooler | None:
        plan, source = self._source.pooling, self._source
        if plan is None:
            return None
        dense = DenseLayers(plan.dense, lambda: make_loader(self._config, self._plugins))
        return RowPooler(make_poolers(self._plugins, plan, model_pooling(self)), model, dense, source.dtype, source.config.hidden_size)

    def execute(self, step: Step) -> StepResult:
        """See `Worker.execute`."""
        if self._runner is None:
            raise InternalError("execute was called before allocate")
        return self._runner.execute(step)

    def close(self) -> None:
        """See `Worker.close`."""
        self._runner = self._built = None

    def _model(self) -> BuiltModel:
        if self._built is None:
            raise InternalError("the worker has not loaded its model yet")
        return self._built


def _start(pipeline: LogitsPipeline, new: NewSequence, vocab_size: int) -> SequenceProcessors:
    """States of a sequence that comes. What a plugin raises is kept for its first row: the step goes on."""
    if new.sampling is None or not new.processors:
        return NO_PROCESSORS
    prompt = new.token_ids[:new.prompt_tokens]
    view = SequenceView(new.sequence_id, new.sample_index, prompt, new.sampling, vocab_size, new.end_token_ids)
    try:
        return pipeline.start(view, new.processors, new.token_ids[new.prompt_tokens:])
    except RequestError as error:
        return SequenceProcessors({}, error)


def _start_pooling(pooler: RowPooler | None, new: NewSequence) -> PoolingState | None:
    return None if pooler is None or new.pooling is None else pooler.start(new, new.pooling)


def make_poolers(plugins: PluginSet, plan: PoolingPlan, of_model: tuple[str, dict[str, Any]]) -> PoolerSet:
    """What pools: `of_model` is what `model_pooling` gives.

    Raises:
        NotRegisteredError: nobody offers the pooling type.
    """
    return PoolerSet(plugins.registries["poolers"], plan, *of_model)


def model_pooling(worker: Any) -> tuple[str, dict[str, Any]]:
    """For ``Executor.call``: how a worker's model wants to be pooled, and what is not its task's default."""
    return worker.model.pooling, dict(worker.model.pooling_options)


def _kernels_note() -> str:
    """Compile or load the C++ kernels; what the start report says about them."""
    reason = native.problem()
    return f"kernels: {'C++' if reason is None else f'torch ({reason})'}; bfloat16 products: {product_kind()}"


def worker_plan(worker: Any) -> MemoryPlan:
    """For ``Executor.call``: a worker's plan."""
    plan: MemoryPlan = worker.plan
    return plan
