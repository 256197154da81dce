"""What plugins offered, by kind and name. Filled once while plugins load, then frozen; targets are imported when they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kvloom.errors import NotRegisteredError, PluginConflictError, PluginError, PluginLoadError
from kvloom.hooks.origin import Origin
from kvloom.hooks.specs import Kind
from kvloom.near import did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kvloom_kernels.requirement import Requirement

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One component that a plugin offers.

    Args:
        name, target, needs, config: as `Registrar.add` was given them.
        settings: the plugin's own configuration section, validated; None when it declares none.
    """

    kind: Kind
    name: str
    target: str
    origin: Origin
    needs: Requirement | None = None
    config: type[BaseModel] | str | None = None
    settings: BaseModel | None = None

    def load(self) -> type[T]:
        """Import the class and check it against its contract. With settings it is a subclass whose ``plugin_config`` they are.

        Raises:
            PluginLoadError: it cannot be imported, or is no class of this kind; ``__cause__`` is the plugin's own exception.
        """
        component = import_target(self.target, self.origin)
        interfaces = import_module("kvloom.interfaces")
        contracts = tuple(getattr(interfaces, name) for name in self.kind.contracts)
        if not (isinstance(component, type) and issubclass(component, contracts)):
            raise PluginLoadError(f"{self.origin}: {self.target} is registered under {self.kind.name} but is no subclass of "
                                  f"kvloom.interfaces.{' or '.join(self.kind.contracts)}")
        if self.settings is None:
            return component
        return type(component.__name__, (component,), {"plugin_config": self.settings, "__doc__": component.__doc__})

    def config_model(self) -> type[BaseModel] | None:
        """The pydantic model of the component's parameters, imported if need be."""
        return import_target(self.config, self.origin) if isinstance(self.config, str) else self.config


def import_target(target: str, origin: Origin) -> Any:
    """What ``"package.module:name"`` names. Raises `PluginLoadError` from the plugin's own exception."""
    module, _, name = target.partition(":")
    try:
        return getattr(import_module(module), name)
    except Exception as error:
        raise PluginLoadError(f"{origin}: {target} cannot be loaded: {type(error).__name__}: {error}") from error


class Registry(Generic[T]):
    """All components of one kind.

    Args:
        kind: of the components.
        providers: name -> distribution or plugin that the configuration chooses for it.
        elsewhere: lines about plugins that are not here (broken, not enabled, other version) and where was searched; told on a miss.
    """

    def __init__(self, kind: Kind, providers: Mapping[str, str], elsewhere: Sequence[str]) -> None:
        self.kind = kind
        self._providers = providers
        self._elsewhere = elsewhere
        self._entries: dict[str, list[Entry[T]]] = {}
        self._frozen = False

    def add(self, entry: Entry[T]) -> None:
        """Take an entry over. Two distributions may offer one name: `resolve` decides."""
        if self._frozen:
            raise PluginError(f"{entry.origin}: {entry.name!r} is registered after start-up; register in {self.kind.hook} only")
        self._entries.setdefault(entry.name, []).append(entry)

    def freeze(self) -> None:
        """No more entries from now on."""
        self._frozen = True

    def names(self) -> list[str]:
        """Every name, sorted."""
        return sorted(self._entries)

    def entries(self) -> list[Entry[T]]:
        """Every entry, sorted by name and distribution."""
        return sorted((e for found in self._entries.values() for e in found), key=lambda e: (e.name, e.origin.distribution))

    def resolve(self, name: str) -> Entry[T]:
        """The one entry of a name.

        Raises:
            PluginConflictError: several distributions offer it and the configuration does not choose.
            NotRegisteredError: nobody does, or not the one that was chosen.
        """
        found = self._entries.get(name, [])
        chosen = self._providers.get(name)
        if chosen is not None:
            found = [e for e in found if chosen in (e.origin.distribution, e.origin.plugin)]
        if len(found) > 1:
            offers = ", ".join(sorted(str(e.origin) for e in found))
            one = sorted(e.origin.distribution for e in found)[0]
            raise PluginConflictError(f"{self.kind.name}: {name!r} is offered by {offers}. Choose one: "
                                      f"providers={{{self.kind.name!r}: {{{name!r}: {one!r}}}}}")
        if not found:
            raise NotRegisteredError(self._miss(name, chosen))
        return found[0]

    def _miss(self, name: str, chosen: str | None) -> str:
        by = f" by {chosen!r}, which the configuration chooses" if chosen else ""
        offers = [f"  {e.name} (by {e.origin.distribution})" for e in self.entries()]
        return "\n".join([f"nothing is registered under {self.kind.name} as {name!r}{by}{did_you_mean(name, self.names())}",
                          "registered:", *(offers or ["  nothing"]), *self._elsewhere])
