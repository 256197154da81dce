"""From configuration and plugins to a model: architecture, dtype, quantization, attention backends. No weights yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvloom.config import EngineConfig
from kvloom.config.checkpoint import Fetch, resolve_model_dir
from kvloom.config.generation import default_sampling, end_tokens, read_generation
from kvloom.config.model import ModelSection
from kvloom.config.model_json import derive_max_model_len, has_window, parse_model_config, without_window
from kvloom.config.pooling import GENERATE, PoolingPlan, choose_task, plan_pooling, refuse_in_vain
from kvloom.config.sentence_transformers import is_sentence_model, read_modules
from kvloom.errors import ConfigError, ModelError, NotRegisteredError, PluginLoadError, UnsupportedArchitectureError, shown
from kvloom.hooks.loader import PluginSet
from kvloom.hooks.registry import Entry
from kvloom.interfaces.attention import AttentionBackend
from kvloom.interfaces.comm import Comm
from kvloom.interfaces.model import BuildContext, Model
from kvloom.interfaces.model_config import ModelConfig
from kvloom.interfaces.quant import QuantMethod
from kvloom.layers.base import dtype_of
from kvloom.params import SamplingParams
from kvloom.runtime.choice import BackendChooser
from kvloom.runtime.custom_code import read_config, refuse_custom_model
from kvloom.runtime.device import ComputeDevice, open_device


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint's directory and what its config.json says, checked. Made once, before anything is built.

    Args:
        entry: the plugin's model class.
        quant: the plugin's quantization method; "none" for plain weights.
        end_token_ids: ids that end a text.
        defaults: sampling parameters of requests that bring none.
        task: what it is used for.
        pooling: how; None where it generates.
        device: where it runs.
    """

    directory: Path
    entry: Entry[Model]
    config: ModelConfig
    max_model_len: int
    dtype: torch.dtype
    quant: Entry[QuantMethod]
    end_token_ids: tuple[int, ...]
    defaults: SamplingParams
    task: str
    pooling: PoolingPlan | None
    device: ComputeDevice


@dataclass(frozen=True)
class BuiltModel:
    """A model with uninitialised parameters.

    Args:
        backends: by layer index, for attention layers.
        notes: lines for the start report.
    """

    model: Model
    backends: Mapping[int, AttentionBackend]
    notes: tuple[str, ...]


def open_source(config: EngineConfig, plugins: PluginSet) -> ModelSource:
    """Find the checkpoint, pick its architecture's plugin, check its config.json.

    Raises:
        ModelError: no such directory or hub id, or a config.json that cannot be used.
        UnsupportedArchitectureError: no plugin registered any of its architectures.
        ConfigError: there is no such device.
    """
    m, device = config.model, open_device(config.device.device)
    directory = resolve_model_dir(m.model, m.revision, m.download_dir, m.hf_token, m.fetch)
    raw = read_config(_config_dir(m, directory), m)
    try:
        entry = find_architecture(raw, plugins)
    except UnsupportedArchitectureError:
        refuse_custom_model(raw, m)
        raise
    model_config = parse_model_config(raw, config_model(entry))
    longest = derive_max_model_len(model_config)
    if m.disable_sliding_window and has_window(raw):
        longest = min(longest, raw["sliding_window"])
        model_config = parse_model_config(without_window(raw), config_model(entry))
    quant = find_quantization(m.quantization, model_config.quantization_config, plugins)
    task = choose_task(m.task, entry.load().tasks_of(model_config), is_sentence_model=is_sentence_model(directory), model=entry.name)
    pooling = open_pooling(config, directory, task, model_config, raw)
    if pooling is not None and pooling.config.pooling_type is not None:
        find_pooler(pooling.config.pooling_type, plugins)
    max_model_len = config.resolved_max_model_len(longest, None if pooling is None else pooling.max_tokens)
    dtype = device.natural_dtype(model_config.dtype) if m.dtype == "auto" else dtype_of(m.dtype)
    generation = read_generation(directory, m.generation_config, m.override_generation_config)
    return ModelSource(directory, entry, model_config, max_model_len, dtype, quant, end_tokens(raw, generation),
                       default_sampling(generation), task, pooling, device)


def open_pooling(config: EngineConfig, directory: Path, task: str, model_config: ModelConfig,
                 raw: Mapping[str, Any]) -> PoolingPlan | None:
    """How the engine pools, None where it generates.

    Raises:
        ModelError: files that cannot be used.
        ConfigError: the caller says what means nothing here.
    """
    said = config.features.override_pooler_config
    refuse_in_vain(task, said)
    if task == GENERATE:
        return None
    modules = read_modules(directory, None if said is None else said.pooling_type) if task == "embed" else None
    return plan_pooling(task, said, modules, model_config, raw)


def find_pooler(name: str, plugins: PluginSet) -> None:
    """Raises `ConfigError` when nobody offers the pooling type that the configuration names."""
    try:
        plugins.registries["poolers"].resolve(name)
    except NotRegisteredError as error:
        raise ConfigError(f"override_pooler_config: pooling_type={name!r}: {error}") from error


def _config_dir(section: ModelSection, directory: Path) -> Path:
    """Where config.json is: `directory` unless ``hf_config_path`` says otherwise."""
    where = section.hf_config_path
    if where is None:
        return directory
    return resolve_model_dir(where, section.revision, section.download_dir, section.hf_token, Fetch(usable=("config.json",)))


def config_model(entry: Entry[Model]) -> type[ModelConfig]:
    """What the architecture's plugin may see of config.json. Raises `PluginLoadError` when it is no `ModelConfig`."""
    model = entry.config_model() or ModelConfig
    if not issubclass(model, ModelConfig):
        raise PluginLoadError(f"{entry.origin}: the config of {entry.name} must be a subclass of kvloom.interfaces.ModelConfig")
    return model


def find_architecture(raw: Mapping[str, Any], plugins: PluginSet) -> Entry[Model]:
    """The first of config.json's architectures that is registered."""
    registry = plugins.registries["models"]
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ModelError(f"config.json's architectures must be a list of names, got {shown(architectures)}")
    for name in architectures:
        if name in registry.names():
            return registry.resolve(name)
    try:
        registry.resolve(architectures[0] if architectures else "")
    except NotRegisteredError as error:
        raise UnsupportedArchitectureError(
            f"Model architectures {list(architectures)} are not supported for now. {error}") from error
    raise UnsupportedArchitectureError("config.json names no architectures")


def find_quantization(requested: str | None, settings: Mapping[str, Any] | None, plugins: PluginSet) -> Entry[QuantMethod]:
    """The method that config.json's ``quantization_config`` names; `requested` may only confirm it.

    Raises:
        ConfigError: the two disagree, or nobody registered the method.
    """
    stored = (settings or {}).get("quant_method")
    if settings and not isinstance(stored, str):
        raise ConfigError(f"config.json's quantization_config must name its quant_method, got {stored!r}")
    if requested is not None and requested != (stored or "none"):
        raise ConfigError(f"quantization={requested!r} does not match the checkpoint, whose weights are "
                          f"{stored or 'plain'}; leave it out")
    try:
        return plugins.registries["quantizations"].resolve(stored or "none")
    except NotRegisteredError as error:
        raise ConfigError(f"Unknown quantization method {stored!r}. {error}") from error


def build_model(config: EngineConfig, plugins: PluginSet, source: ModelSource, device: torch.device, comm: Comm) -> BuiltModel:
    """Make the model, for the source's device. `device`: where its parameters are; on the meta device nothing is allocated and only
    shapes are right (memory plan)."""
    target = source.device
    plain = plugins.registries["quantizations"].resolve("none").load()({})
    quant = plain if source.quant.name == "none" else source.quant.load()(source.config.quantization_config or {})
    reason = quant.supports(source.dtype, target.torch_device)
    if reason is not None:
        raise ConfigError(f"quantization method {source.quant.name!r} cannot run here: {reason}")
    deterministic = config.device.deterministic
    if deterministic:
        check_deterministic(source, plain, quant)
    chooser = BackendChooser(plugins.registries["attention_backends"], config.device.attention_backend, target.machine(),
                             deterministic=deterministic)
    build = BuildContext(
        dtype=source.dtype, device=device, quant=quant, plain=plain, comm=comm, max_model_len=source.max_model_len,
        cache_dtype=source.dtype, block_tokens=config.cache.block_size, make_backend=chooser,
        task=source.task, target=target.kind)
    model = source.entry.load()(source.config, build)
    return BuiltModel(model, chooser.by_layer, tuple(chooser.notes))


def check_deterministic(source: ModelSource, *methods: QuantMethod) -> None:
    """Raises `ConfigError` when the model or a method of its products may give a request other bits beside other rows."""
    device = source.device.torch_device
    problems = [f"{type(m).__name__}: {reason}" for m in methods if (reason := m.row_invariant(source.dtype, device))]
    if not source.entry.load().row_invariant:
        problems.append(f"{source.entry.name} ({source.entry.origin}): it does not say that rows are computed each for itself")
    if source.pooling is not None:
        problems.append(f"task {source.task!r}: what is pooled over chunks of a prompt depends on how it was cut")
    if problems:
        raise ConfigError(f"deterministic=True cannot be kept here. {'; '.join(dict.fromkeys(problems))}")
