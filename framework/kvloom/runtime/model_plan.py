"""What a model will need, from its config.json and the headers of its files alone: nothing is loaded."""

from __future__ import annotations

import torch
from pydantic import ValidationError

from kvloom.config import EngineConfig
from kvloom.config.other_values import instead
from kvloom.errors import ConfigError, NotRegisteredError
from kvloom.hooks.loader import PluginSet
from kvloom.interfaces import WeightLoader
from kvloom.runtime.builder import BuiltModel, ModelSource, build_model
from kvloom.runtime.comm import LocalComm
from kvloom.runtime.memory import MemoryPlan, memory_needs, plan_memory
from kvloom.runtime.offload import layers_to_offload, weights_bytes
from kvloom.runtime.weights import check_catalog, wanted_infos, wanted_slots


def plan_model(config: EngineConfig, plugins: PluginSet, source: ModelSource, *,
               is_host: bool | None = None) -> tuple[MemoryPlan, BuiltModel]:
    """The memory plan, from config.json and file headers alone; the model exists on the meta device only.

    Args:
        is_host: whether the device is the host itself, so that no weights can be kept elsewhere; None: what the source's device says.

    Raises:
        CheckpointError: the files do not hold what the model needs.
    """
    built = build_model(config, plugins, source, torch.device("meta"), LocalComm())
    slots = wanted_slots(built.model)
    catalog = make_loader(config, plugins).catalog(source.directory, wanted_infos(slots))
    check_catalog(built.model, slots, catalog, source.directory)
    is_host = source.device.is_host if is_host is None else is_host
    offloaded = [] if is_host else layers_to_offload(built.model, config.cache.cpu_offload_bytes)
    return plan_memory(memory_needs(config, source, built, weights_bytes(offloaded)), source.device.memory()), built


def make_loader(config: EngineConfig, plugins: PluginSet) -> WeightLoader:
    """The weight loader that ``load_format`` names, with the settings of ``model_loader_extra_config``.

    Raises:
        ConfigError: nobody registered it, or settings that it does not take.
    """
    name, given = config.model.load_format, config.model.model_loader_extra_config
    try:
        entry = plugins.registries["loaders"].resolve(name)
    except NotRegisteredError as error:
        raise ConfigError(f"load_format={name!r}{instead('load_format', name)}: {error}") from error
    model = entry.config_model()
    if model is None:
        if given:
            raise ConfigError(f"model_loader_extra_config={given!r}: the loader {name!r} ({entry.origin}) takes none; leave it out")
        plain: WeightLoader = entry.load()()
        return plain
    try:
        settings = model.model_validate(given or {})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"model_loader_extra_config={given!r}: {problems} (settings of {name!r}: "
                          f"{', '.join(model.model_fields)})") from error
    loader: WeightLoader = entry.load()(settings)
    return loader
