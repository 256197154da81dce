"""Which plugins are installed, and which of them run. Reads metadata only: nothing is imported here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvloom.errors import NotRegisteredError, PluginConflictError
from kvloom.hooks.origin import GROUP, OWN_DISTRIBUTION, Origin
from kvloom.near import did_you_mean


@dataclass(frozen=True, slots=True)
class PluginSelection:
    """Which plugins run. Built-ins always do.

    Args:
        named: entry-point names that must run; None enables every installed plugin.
        source: who said so, for messages: "plugins=", "KVLOOM_PLUGINS", a file.
    """

    named: tuple[str, ...] | None = None
    source: str = "the default"

    def enabled(self, installed: Sequence[Origin]) -> list[Origin]:
        """Those that run, in a fixed order: built-ins first, then by name and distribution.

        Raises:
            NotRegisteredError: a name that no installed plugin has.
            PluginConflictError: a name that several distributions' plugins have.
        """
        for name in self.named or ():
            providers = [o for o in installed if o.plugin == name]
            if not providers:
                known = [o.plugin for o in installed]
                raise NotRegisteredError(
                    f"{self.source} names the plugin {name!r}, which is not installed{did_you_mean(name, known)}\ninstalled:\n"
                    + "\n".join(f"  {o.plugin} ({o.distribution} {o.version})" for o in installed) + f"\n{searched()}")
            if len(providers) > 1:
                raise PluginConflictError(f"{self.source} names the plugin {name!r}, which several distributions have: "
                                          f"{', '.join(f'{o.distribution} {o.version} in {o.location}' for o in providers)}; "
                                          "uninstall all but one")
        return [o for o in installed if o.is_builtin or self.named is None or o.plugin in self.named]

    def is_named(self, origin: Origin) -> bool:
        """Whether a failure of this plugin is fatal."""
        return origin.is_builtin or origin.plugin in (self.named or ())


@dataclass(frozen=True, slots=True)
class Installed:
    """Entry points found, and lines about those that were shadowed."""

    origins: tuple[Origin, ...]
    notes: tuple[str, ...] = field(default=())


def find_plugins() -> Installed:
    """Every entry point of the group, once a distribution: where two metadata directories describe one, the first on sys.path."""
    from importlib_metadata import distributions

    found: list[Origin] = []
    notes: list[str] = []
    seen: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"] or ""
        entry_points = distribution.entry_points.select(group=GROUP)
        if not entry_points:
            continue
        location = str(distribution.locate_file(""))
        if seen.setdefault(name.lower(), location) != location:
            notes.append(f"{name} {distribution.version} in {location} is shadowed by the one in {seen[name.lower()]}")
            continue
        found += [Origin(e.name, e.module, name, distribution.version, location) for e in entry_points]
    unique = {(o.plugin, o.distribution): o for o in reversed(found)}
    ordered = sorted(unique.values(), key=lambda o: (o.distribution != OWN_DISTRIBUTION, o.plugin, o.distribution))
    return Installed(tuple(ordered), tuple(notes))


def searched() -> str:
    """Where entry points were looked for, for a message about one that was not found."""
    return "entry points were searched in: " + ", ".join(p or "." for p in sys.path)
