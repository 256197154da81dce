"""Choosing an attention backend: data first (`needs`), then `supports`, then an explicit order. Never a silent fallback."""

from __future__ import annotations

from kvloom.config.other_values import instead
from kvloom.errors import ConfigError, NotRegisteredError
from kvloom.hooks.registry import Entry, Registry
from kvloom.interfaces.attention import AttentionBackend, AttentionSpec
from kvloom_kernels.requirement import Machine

AUTO_ORDER = {"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "torch", "reference")}
"""What "auto" tries on each type of device, first to last. A third party's backend is chosen by name only."""


class BackendChooser:
    """Makes the backend of each attention layer. Equal specs share one; `notes` says what was chosen and refused, and why.

    Args:
        requested: a name, or "auto".
        deterministic: only those whose results do not depend on other rows.
    """

    def __init__(self, registry: Registry[AttentionBackend], requested: str, machine: Machine, *, deterministic: bool = False) -> None:
        self._registry, self._machine, self._deterministic = registry, machine, deterministic
        self._names = AUTO_ORDER[machine.device] if requested == "auto" else (requested,)
        self._made: dict[AttentionSpec, AttentionBackend] = {}
        self.by_layer: dict[int, AttentionBackend] = {}
        self.notes: list[str] = []

    def __call__(self, spec: AttentionSpec, layer_index: int) -> AttentionBackend:
        """See `BackendFactory`."""
        if spec not in self._made:
            self._made[spec] = self._choose(spec)
        self.by_layer[layer_index] = self._made[spec]
        return self._made[spec]

    def _choose(self, spec: AttentionSpec) -> AttentionBackend:
        refused: list[str] = []
        for name in self._names:
            entry = self._resolve(name)
            reason = entry.needs.unmet(self._machine, spec.dtype) if entry.needs else None
            backend = entry.load() if reason is None else None
            reason = reason if backend is None else self._problem(backend, spec)
            if backend is not None and reason is None:
                self._note(name, refused)
                return backend(spec)
            refused.append(f"{name}: {reason}")
        raise ConfigError(f"no attention backend can serve {spec}. Refused: {'; '.join(refused)}. "
                          f"Registered: {', '.join(self._registry.names())}; choose one with attention_backend=")

    def _resolve(self, name: str) -> Entry[AttentionBackend]:
        try:
            return self._registry.resolve(name)
        except NotRegisteredError as error:
            raise ConfigError(f"attention_backend={name!r}{instead('attention_backend', name)}: {error}") from error

    def _problem(self, backend: type[AttentionBackend], spec: AttentionSpec) -> str | None:
        if self._deterministic and not backend.row_invariant:
            return "deterministic=True, and its results may depend on other rows"
        return backend.supports(spec)

    def _note(self, name: str, refused: list[str]) -> None:
        line = f"attention backend: {name}" + (f" (refused: {'; '.join(refused)})" if refused else "")
        if line not in self.notes:
            self.notes.append(line)
