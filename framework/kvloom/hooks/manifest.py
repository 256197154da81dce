"""What was loaded, as data: the engine's process sends it to its workers, which must load exactly the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kvloom.errors import ManifestMismatchError
from kvloom.hooks.origin import Origin


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One plugin that runs.

    Args:
        contracts: ``KVLOOM_API`` of the plugin.
        config: its configuration section as JSON values.
        module_sha256: of the entry-point module's file.
    """

    plugin: str
    distribution: str
    version: str
    contracts: Mapping[str, int]
    config: Mapping[str, Any]
    module_sha256: str

    def differences(self, other: ManifestEntry) -> list[str]:
        """``field: mine, not theirs`` for each field that differs."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]!r}, not {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every plugin that runs, by name, and which provider was chosen for ambiguous names."""

    entries: tuple[ManifestEntry, ...]
    providers: Mapping[str, Mapping[str, str]]

    @property
    def hash(self) -> str:
        """SHA-256 over all of it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """As text, keys sorted."""
        return json.dumps({"entries": [asdict(e) for e in self.entries], "providers": self.providers}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of `to_json`."""
        data = json.loads(text)
        return cls(tuple(ManifestEntry(**e) for e in data["entries"]), data["providers"])

    def check_same(self, resolved: Manifest) -> None:
        """Raises `ManifestMismatchError` that names each difference when `resolved` (this process) is not this manifest."""
        if self == resolved:
            return
        mine = {(e.plugin, e.distribution): e for e in self.entries}
        theirs = {(e.plugin, e.distribution): e for e in resolved.entries}
        lines = [f"  {p} of {d} is missing here" for p, d in mine.keys() - theirs.keys()]
        lines += [f"  {p} of {d} is only here" for p, d in theirs.keys() - mine.keys()]
        for key in sorted(mine.keys() & theirs.keys()):
            lines += [f"  {key[0]} of {key[1]} has {d}" for d in theirs[key].differences(mine[key])]
        if self.providers != resolved.providers:
            lines.append(f"  providers: {resolved.providers!r}, not {self.providers!r}")
        raise ManifestMismatchError("this process resolved other plugins than the engine's:\n" + "\n".join(sorted(lines)))


def manifest_entry(origin: Origin, contracts: Mapping[str, int], config: Mapping[str, Any], source: bytes) -> ManifestEntry:
    """The entry of one plugin whose module has this source."""
    return ManifestEntry(origin.plugin, origin.distribution, origin.version, dict(contracts), dict(config),
                         hashlib.sha256(source).hexdigest())
