"""``kvloom plugins list`` and ``show``."""

from __future__ import annotations

import argparse
import json
import os

from kvloom.cli.tables import print_rows
from kvloom.config.engine_config import PLUGINS_VARIABLE
from kvloom.errors import NotRegisteredError
from kvloom.hooks.discovery import Installed, PluginSelection, find_plugins, searched
from kvloom.hooks.origin import Origin
from kvloom.near import did_you_mean


def _selection() -> PluginSelection:
    """What ``LLM(...)`` without ``plugins=`` would run."""
    variable = os.environ.get(PLUGINS_VARIABLE)
    if variable is None:
        return PluginSelection()
    return PluginSelection(tuple(n.strip() for n in variable.split(",") if n.strip()), PLUGINS_VARIABLE)


def list_plugins(arguments: argparse.Namespace) -> int:
    """One line a plugin: name, distribution, version, status, module."""
    installed = find_plugins()
    enabled = _selection().enabled(installed.origins)
    if arguments.json:
        print(json.dumps([_as_json(o, o in enabled) for o in installed.origins], indent=2))
        return 0
    print_rows(("plugin", "distribution", "status", "module"),
               [(o.plugin, f"{o.distribution} {o.version}", _status(o, o in enabled), o.module) for o in installed.origins])
    for note in installed.notes:
        print(f"note: {note}")
    return 0


def _status(origin: Origin, is_enabled: bool) -> str:
    return "built-in" if origin.is_builtin else "enabled" if is_enabled else "not enabled"


def _as_json(origin: Origin, is_enabled: bool) -> dict[str, str]:
    return {"plugin": origin.plugin, "distribution": origin.distribution, "version": origin.version, "module": origin.module,
            "location": origin.location, "status": _status(origin, is_enabled)}


def show_plugin(arguments: argparse.Namespace) -> int:
    """What a plugin offers, by kind. Raises what loading it raises."""
    from kvloom.hooks.loader import load_plugins

    origin = _find(find_plugins(), arguments.plugin)
    loaded = load_plugins(PluginSelection((origin.plugin,), "kvloom plugins show"))
    entries = [e for registry in loaded.registries.values() for e in registry.entries() if e.origin == origin]
    manifest = next(e for e in loaded.manifest.entries if (e.plugin, e.distribution) == (origin.plugin, origin.distribution))
    if arguments.json:
        print(json.dumps({**_as_json(origin, True), "contracts": dict(manifest.contracts),
                          "offers": [{"kind": e.kind.name, "name": e.name, "target": e.target} for e in entries]}, indent=2))
        return 0
    print(f"{origin.plugin}: {origin.distribution} {origin.version}, module {origin.module}")
    print(f"contracts: {', '.join(f'{kind} {version}' for kind, version in manifest.contracts.items()) or 'none'}")
    print_rows(("kind", "name", "class", "needs"),
               [(e.kind.name, e.name, e.target, f"needs {e.needs}" if e.needs else "") for e in entries])
    return 0


def _find(installed: Installed, name: str) -> Origin:
    found = [o for o in installed.origins if o.plugin == name]
    if not found:
        raise NotRegisteredError(f"no plugin {name!r} is installed{did_you_mean(name, [o.plugin for o in installed.origins])} "
                                 f"({searched()})")
    return found[0]
