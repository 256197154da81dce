"""The whole configuration: sections, where each value came from, and what is said about values that change nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, Union, get_args, get_origin

from pydantic import ValidationError

from kvloom.config.cache import CacheSection
from kvloom.config.compat import OTHER_ARGS, RENAMED, TASK_ARGS, task_of
from kvloom.config.device import DeviceSection
from kvloom.config.features import FeatureSection
from kvloom.config.model import ModelSection
from kvloom.config.plugins import PluginSection
from kvloom.config.scheduler import SchedulerSection
from kvloom.config.section import NoEffect, Section
from kvloom.config.yaml_file import FileValue, read_yaml
from kvloom.core.limits import SchedulerLimits
from kvloom.errors import ConfigError, UnknownKeyError, UnsupportedFeatureError
from kvloom.hooks.discovery import PluginSelection
from kvloom.near import did_you_mean

SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection, "cache": CacheSection, "scheduler": SchedulerSection, "device": DeviceSection,
    "features": FeatureSection, "plugins": PluginSection,
}
SECTION_OF = {name: section for section, cls in SECTIONS.items() for name in cls.model_fields}
"""Parameter -> its section."""
KNOWN_NAMES = frozenset({*SECTION_OF, *OTHER_ARGS, *RENAMED, *TASK_ARGS})
"""Every name that can be given, in any version's spelling."""
PLUGINS_VARIABLE = "KVLOOM_PLUGINS"
"""Environment variable with the names of plugins, separated by commas; ``plugins=`` and a file win."""


@dataclass(frozen=True)
class EngineConfig:
    """Everything that decides what an engine is. Two with equal sections make equal engines.

    Args:
        origins: parameter -> where its value was given: "argument", "file.yaml:3". Those not in here have their default.
        file: the YAML file it was read from.
        notes: lines for the log: given values that have no effect, names of other versions.
    """

    model: ModelSection
    cache: CacheSection
    scheduler: SchedulerSection
    device: DeviceSection
    features: FeatureSection
    plugins: PluginSection
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)
    file: Path | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> Self:
        """From constructor arguments.

        Raises:
            TypeError: a name that neither kvloom nor vLLM has.
            ConfigError: a value that is wrong; `UnsupportedFeatureError` for one that does not work so far.
        """
        for name in kwargs:
            if name not in KNOWN_NAMES:
                raise TypeError(f"LLM() got an unexpected keyword argument {name!r}{did_you_mean(name, [*SECTION_OF, *OTHER_ARGS])}")
        return cls._build(kwargs, dict.fromkeys(kwargs, "argument"))

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Self:
        """From a YAML file; `overrides` win.

        Raises:
            UnknownKeyError: with file, line and near name.
            ConfigError: see `from_kwargs`.
        """
        path = Path(path)
        found = read_yaml(path)
        for name, value in found.items():
            if name not in KNOWN_NAMES:
                raise UnknownKeyError(f"{path}:{value.line}: unknown key {name!r}{did_you_mean(name, [*SECTION_OF, *OTHER_ARGS])}")
        values = {name: found_value.value for name, found_value in found.items()} | overrides
        built = cls._build(values, _file_origins(path, found) | dict.fromkeys(overrides, "argument"))
        return replace(built, file=path)

    @classmethod
    def _build(cls, values: Mapping[str, Any], origins: Mapping[str, str]) -> Self:
        values, origins, notes = _translate(values, origins)
        sections: dict[str, Any] = {}
        for name, section in SECTIONS.items():
            try:
                sections[name] = section(**{k: v for k, v in values.items() if SECTION_OF[k] == name})
            except ValidationError as error:
                raise ConfigError(_problems(section, error, origins)) from error
            sections[name].check_supported()
            notes += [f"{k}={v!r} has no effect: {state.reason}" for k, v in values.items()
                      if SECTION_OF[k] == name and isinstance(state := section.state(k), NoEffect)
                      and v != section.model_fields[k].get_default() and state.works_on != values.get("device", "auto")]
        if sections["model"].trust_remote_code:
            notes.append("trust_remote_code=True: code that comes with the checkpoint may run in this process")
        return cls(**sections, origins=origins, notes=tuple(notes))

    @property
    def selection(self) -> PluginSelection:
        """Which plugins run. From a file: only those it names. Else: ``plugins=``, KVLOOM_PLUGINS, or every installed one."""
        if self.plugins.plugins is not None:
            return PluginSelection(self.plugins.plugins, self.origins.get("plugins", "plugins="))
        if self.file is not None:
            return PluginSelection((), str(self.file))
        variable = os.environ.get(PLUGINS_VARIABLE)
        if variable is not None:
            return PluginSelection(tuple(n.strip() for n in variable.split(",") if n.strip()), PLUGINS_VARIABLE)
        return PluginSelection()

    def resolved_max_model_len(self, derived: int, usual: int | None = None) -> int:
        """``max_model_len``, at most what the model was made for (`derived`); `usual` tokens unless it is given.

        Raises:
            ConfigError: it is more.
        """
        given = self.model.max_model_len
        if given is not None and given > derived:
            raise ConfigError(f"max_model_len={given} is more than the {derived} tokens that config.json says the model was made for; "
                              "lower it, or change config.json's value with hf_overrides (max_position_embeddings, rope_scaling)")
        return given or min(derived, usual or derived)

    def limits(self, max_model_len: int, *, chunkable: bool) -> SchedulerLimits:
        """See `SchedulerSection.limits`."""
        return self.scheduler.limits(max_model_len, enable_prefix_caching=self.cache.enable_prefix_caching, chunkable=chunkable)

    def rows(self) -> list[tuple[str, Any, str]]:
        """``(parameter, value, origin)`` of every parameter, secrets masked."""
        out = []
        for section, cls in SECTIONS.items():
            for name in cls.model_fields:
                value = getattr(getattr(self, section), name)
                shown = "***" if cls.is_secret(name) and value not in (None, True, False) else value
                out.append((name, shown, self.origins.get(name, "default")))
        return out


def _file_origins(path: Path, found: Mapping[str, FileValue]) -> dict[str, str]:
    return {name: f"{path}:{value.line}" for name, value in found.items()}


def _translate(values: Mapping[str, Any], origins: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Names of other versions -> ours; those without a meaning here are checked and dropped."""
    ours: dict[str, Any] = {}
    from_where: dict[str, str] = {}
    notes: list[str] = []
    task = task_of(values)
    if task is not None:
        source = next(n for n in ("convert", "runner") if TASK_ARGS[n].get(values.get(n, "auto")) is not None)
        ours["task"], from_where["task"] = task, origins[source]
        notes.append(f"{' and '.join(f'{n}={values[n]!r}' for n in TASK_ARGS if n in values)} is called task={task!r} here")
    for name, value in values.items():
        if name in TASK_ARGS or (name == "task" and task is not None):
            continue
        target = RENAMED.get(name, name)
        if target != name:
            notes.append(f"{name} is called {target} here")
            if target in values:
                raise ConfigError(f"{name} and {target} mean the same; give one of them")
        other = OTHER_ARGS.get(target)
        if other is None:
            ours[target], from_where[target] = value, origins[name]
        elif isinstance(other.state, NoEffect):
            other.check(name, value)
            if value != other.default:
                notes.append(f"{name}={value!r} has no effect: {other.state.reason}")
        elif value not in (None, other.default, *other.state.values):
            raise UnsupportedFeatureError(name, value, other.state.works)
    return ours, from_where, notes


def _problems(section: type[Section], error: ValidationError, origins: Mapping[str, str]) -> str:
    """Every wrong value of a section: where it was given, what it was, what is wrong."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        if not problem["loc"]:  # of the section as a whole, whose message names the fields; its values may be secret
            lines[problem["msg"].removeprefix("Value error, ")] = ""
            continue
        name = str(problem["loc"][0])
        inner = "".join(f"[{part!r}]" for part in problem["loc"][1 + _has_choice(section, name):]
                        if isinstance(part, int | str) and part != "[key]")
        where = origins.get(name, "")
        prefix = f"{where}: " if where not in ("", "argument") else ""
        shown = "***" if name in section.model_fields and section.is_secret(name) else repr(problem["input"])[:200]
        if problem["type"] == "missing":
            lines[f"{name} is missing"] = ""
        else:
            message = problem["msg"].removeprefix("Value error, ")
            what = f"{prefix}{name}{inner}={shown}"
            before = lines.get(what)
            lines[what] = f": {message}" if before is None else f"{before}, or: {message}"
    return "; ".join(what + message for what, message in lines.items())


def _has_choice(section: type[Section], name: str) -> bool:
    """Whether a field takes values of several types: pydantic then has a problem for each, and the type's name in its place."""
    annotation = section.model_fields[name].annotation if name in section.model_fields else None
    return get_origin(annotation) in (UnionType, Union) and len(set(get_args(annotation)) - {NoneType}) > 1
