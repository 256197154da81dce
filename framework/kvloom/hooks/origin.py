"""Where a plugin comes from: an entry point of an installed distribution, as its metadata say."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = "kvloom"
"""Entry point group of all plugins."""
OWN_DISTRIBUTION = "kvloom"


@dataclass(frozen=True, slots=True)
class Origin:
    """One plugin.

    Args:
        plugin: entry-point name, what ``plugins=[...]`` and KVLOOM_PLUGINS name.
        module: that is imported when the plugin runs.
        distribution, version: the package that declares it.
        location: directory of the distribution's metadata, to find stale ones.
    """

    plugin: str
    module: str
    distribution: str
    version: str
    location: str = ""

    @property
    def is_builtin(self) -> bool:
        """Whether it is one of ours: always enabled, never optional."""
        return self.distribution == OWN_DISTRIBUTION

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} of {self.distribution} {self.version}"
