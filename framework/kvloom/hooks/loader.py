"""From entry points to frozen registries. The only module that imports plugins and the only one that uses pluggy's manager."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy
from pydantic import BaseModel, ValidationError

from kvloom.errors import ConfigError, PluginError, PluginHookError, PluginLoadError, PluginVersionError
from kvloom.hooks.discovery import Installed, PluginSelection, find_plugins, searched
from kvloom.hooks.manifest import Manifest, ManifestEntry, manifest_entry
from kvloom.hooks.origin import Origin
from kvloom.hooks.registry import Entry, Registry, import_target
from kvloom.hooks.specs import KINDS, OBSERVERS, HookSpecs, Kind
from kvloom.logs import get_logger
from kvloom.near import did_you_mean

if TYPE_CHECKING:
    from kvloom_kernels.requirement import Requirement

Observer = Callable[[Any], object]


@dataclass(frozen=True)
class PluginSet:
    """What an engine works with.

    Args:
        registries: by kind, frozen.
        observers: by observer hook, each with its origin.
        manifest: what was loaded.
        notes: lines for the start report: plugins that were left out, and why.
    """

    registries: Mapping[str, Registry[Any]]
    observers: Mapping[str, tuple[tuple[Origin, Observer], ...]]
    manifest: Manifest
    notes: tuple[str, ...]


class BoundRegistrar:
    """See `kvloom.interfaces.Registrar`. Keeps entries until the plugin's hooks have all run: a plugin is taken whole or not."""

    def __init__(self, kind: Kind, origin: Origin, config: BaseModel | None, entries: list[Entry[Any]]) -> None:
        self._kind, self._origin, self.config, self._entries = kind, origin, config, entries

    def add(self, name: str, target: str, *, needs: Requirement | None = None,
            config: type[BaseModel] | str | None = None) -> None:
        """See `Registrar.add`."""
        if not isinstance(name, str) or not name.strip():
            raise PluginError(f"{self._origin}: a name must be a text that is not empty, got {name!r}")
        if not _is_target(target):
            raise PluginError(f"{self._origin}: the target of {name!r} must be 'package.module:Class', got {target!r}")
        if isinstance(config, str) and not _is_target(config):
            raise PluginError(f"{self._origin}: config of {name!r} must be a pydantic model or 'package.module:Class', got {config!r}")
        if any(e.kind is self._kind and e.name == name for e in self._entries):
            raise PluginError(f"{self._origin} registers {name!r} twice under {self._kind.name}")
        self._entries.append(Entry(self._kind, name, target, self._origin, needs, config, self.config))


@dataclass(frozen=True)
class _Loaded:
    """One plugin, ready to be taken over."""

    entries: list[Entry[Any]]
    observers: dict[str, Observer]
    manifest: ManifestEntry


def load_plugins(selection: PluginSelection, plugin_config: Mapping[str, Mapping[str, Any]] | None = None,
                 providers: Mapping[str, Mapping[str, str]] | None = None) -> PluginSet:
    """Import the selected plugins and let them register.

    A plugin that is named or configured and fails is fatal; one that runs only because it is installed is left out with a warning,
    and every later miss mentions it.

    Args:
        plugin_config: entry-point name -> that plugin's configuration section.
        providers: kind -> component name -> distribution or plugin that provides it where several do.

    Raises:
        PluginError: see the subclasses in `kvloom.errors`.
        ConfigError: a configuration section that its plugin does not accept, or for no plugin that runs.
    """
    installed = find_plugins()
    enabled = selection.enabled(installed.origins)
    plugin_config, providers = plugin_config or {}, providers or {}
    _check_keys(plugin_config, providers, enabled)
    loaded: list[_Loaded] = []
    left_out = [f"{o}: installed, not enabled; name it in plugins= to use it" for o in installed.origins if o not in enabled]
    for origin in enabled:
        try:
            loaded.append(_load(origin, plugin_config.get(origin.plugin)))
        except (PluginError, ConfigError) as error:
            if selection.is_named(origin) or origin.plugin in plugin_config:  # somebody wants this one
                raise
            get_logger().warning("plugin left out", plugin=str(origin), reason=str(error), exc_info=error.__cause__ or error)
            left_out.append(f"{origin}: left out: {error}")
    return _plugin_set(loaded, providers, installed, left_out)


def load_same(manifest: Manifest) -> PluginSet:
    """Load exactly what another process loaded.

    Raises:
        ManifestMismatchError: this process finds other plugins, versions or files.
        PluginError: one of them cannot be loaded here.
    """
    names = tuple(e.plugin for e in manifest.entries)
    plugins = load_plugins(PluginSelection(names, "the engine's manifest"),
                           {e.plugin: e.config for e in manifest.entries if e.config}, manifest.providers)
    manifest.check_same(plugins.manifest)
    return plugins


def _plugin_set(loaded: list[_Loaded], providers: Mapping[str, Mapping[str, str]], installed: Installed,
                left_out: list[str]) -> PluginSet:
    elsewhere = [*installed.notes, *left_out, searched()]
    registries = {name: Registry[Any](kind, providers.get(name, {}), elsewhere) for name, kind in KINDS.items()}
    for plugin in loaded:
        for entry in plugin.entries:
            registries[entry.kind.name].add(entry)
    for registry in registries.values():
        registry.freeze()
    observers = {hook: tuple((_origin(p), p.observers[hook]) for p in loaded if hook in p.observers) for hook in OBSERVERS}
    manifest = Manifest(tuple(p.manifest for p in loaded), {k: dict(v) for k, v in providers.items()})
    return PluginSet(registries, observers, manifest, (*installed.notes, *left_out))


def _origin(plugin: _Loaded) -> Origin:
    return Origin(plugin.manifest.plugin, "", plugin.manifest.distribution, plugin.manifest.version)


def _check_keys(plugin_config: Mapping[str, Any], providers: Mapping[str, Any], enabled: list[Origin]) -> None:
    for name in plugin_config:
        if name not in [o.plugin for o in enabled]:
            raise ConfigError(f"plugin_config has a section for {name!r}, but no such plugin runs"
                              f"{did_you_mean(name, [o.plugin for o in enabled])}")
    for kind in providers:
        if kind not in KINDS:
            raise ConfigError(f"providers: there is no kind {kind!r}{did_you_mean(kind, KINDS)} (kinds: {', '.join(KINDS)})")


def _load(origin: Origin, section: Mapping[str, Any] | None) -> _Loaded:
    """Import one plugin, check it against the hook specs, and collect what it registers."""
    try:
        module = import_module(origin.module)
    except (Exception, SystemExit) as error:
        raise PluginLoadError(f"{origin} cannot be imported ({origin.module}): {type(error).__name__}: {error}") from error
    manager = pluggy.PluginManager("kvloom")
    manager.add_hookspecs(HookSpecs)
    versions = _check_versions(origin, module)
    config = _validate_section(origin, module, section)
    try:
        manager.register(module, origin.plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginHookError(_hook_message(origin, module, error)) from error
    entries: list[Entry[Any]] = []
    for kind in KINDS.values():
        for implementation in getattr(manager.hook, kind.hook).get_hookimpls():
            _call(origin, implementation, BoundRegistrar(kind, origin, config, entries))
    observers = {hook: implementation.function for hook in OBSERVERS
                 for implementation in getattr(manager.hook, hook).get_hookimpls()}
    source = Path(module.__file__).read_bytes() if module.__file__ else b""
    values = config.model_dump(mode="json") if config is not None else {}
    return _Loaded(entries, observers, manifest_entry(origin, versions, values, source))


def _call(origin: Origin, implementation: Any, registrar: BoundRegistrar) -> None:
    try:
        implementation.function(*([registrar] if implementation.argnames else []))
    except PluginError:
        raise
    except Exception as error:
        hook = implementation.function.__name__
        raise PluginLoadError(f"{origin}: its hook {hook} raised {type(error).__name__}: {error}") from error


def _check_versions(origin: Origin, module: ModuleType) -> dict[str, int]:
    """``KVLOOM_API`` of a module. Raises `PluginVersionError` when it offers a kind for another version, or none, of its contract."""
    declared = getattr(module, "KVLOOM_API", {})
    if not isinstance(declared, dict) or not all(isinstance(k, str) and type(v) is int for k, v in declared.items()):
        raise PluginVersionError(f"{origin}: KVLOOM_API must map kinds to contract versions, got {declared!r}")
    for kind in KINDS.values():
        if not hasattr(module, kind.hook):
            continue
        if kind.name not in declared:
            raise PluginVersionError(f"{origin} implements {kind.hook} but does not say for which contract version; "
                                     f"add KVLOOM_API = {{{kind.name!r}: {kind.version}}} to {module.__name__}")
        if declared[kind.name] != kind.version:
            raise PluginVersionError(f"{origin}: {kind.hook} wants version {declared[kind.name]} of the {kind.name} contract, this "
                                     f"kvloom offers version {kind.version}; install a release of {origin.distribution} made for it")
    return dict(declared)


def _validate_section(origin: Origin, module: ModuleType, section: Mapping[str, Any] | None) -> BaseModel | None:
    """The plugin's configuration section, checked by the model that ``KVLOOM_CONFIG`` names; its defaults when none was given."""
    declared = getattr(module, "KVLOOM_CONFIG", None)
    if declared is None:
        if section is not None:
            raise ConfigError(f"{origin} takes no configuration (its module has no KVLOOM_CONFIG), got {dict(section)!r}")
        return None
    model = import_target(declared, origin) if isinstance(declared, str) else declared
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise PluginLoadError(f"{origin}: KVLOOM_CONFIG must be a pydantic model or 'package.module:Model', got {declared!r}")
    try:
        return model.model_validate(dict(section or {}))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"plugin_config for {origin}: {problems}") from error


def _hook_message(origin: Origin, module: ModuleType, error: pluggy.PluginValidationError) -> str:
    """Which hook is wrong, what is right, and the near name."""
    known = [*(k.hook for k in KINDS.values()), *OBSERVERS]
    for name, value in vars(module).items():
        marks = getattr(value, "kvloom_impl", None)
        if not isinstance(marks, dict) or marks.get("optionalhook"):
            continue
        if name not in known:
            return f"{origin} implements {name}, which is no hook{did_you_mean(name, known)} (hooks: {', '.join(known)})"
        wanted = [p for p in inspect.signature(getattr(HookSpecs, name)).parameters if p != "self"]
        given = list(inspect.signature(value).parameters)
        if not set(given) <= set(wanted):
            return f"{origin}: {name}({', '.join(given)}) must be {name}({', '.join(wanted)})"
    return f"{origin}: {error}"


def _is_target(text: object) -> bool:
    if not isinstance(text, str):
        return False
    module, _, name = text.partition(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))
