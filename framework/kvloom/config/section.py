"""What every configuration section shares: frozen, no unknown keys, no NaN, and a state for each field."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from kvloom.errors import UnsupportedFeatureError


@dataclass(frozen=True, slots=True)
class NoEffect:
    """Metadata of a field that is taken and changes nothing, with the reason; said once in the log when it was given.

    Args:
        works_on: the kind of device where it does what it says; None: nowhere.
    """

    reason: str
    works_on: str | None = None


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Metadata of a field that only takes some values so far.

    Args:
        works: what to give instead, as a phrase.
        values: that work, besides the default.
    """

    works: str
    values: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class NotYet:
    """Metadata of a field that works, except for some values that vLLM has.

    Args:
        values: each with what to give or do instead, as a phrase.
    """

    values: Mapping[Any, str]


@dataclass(frozen=True, slots=True)
class Secret:
    """Metadata of a field whose value is never shown."""


class Section(BaseModel):
    """A group of parameters. Field names are the constructor's, unique over all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def state(cls, name: str) -> NoEffect | Unsupported | None:
        """State of a field; None means that it works."""
        return next((m for m in cls.model_fields[name].metadata if isinstance(m, NoEffect | Unsupported)), None)

    @classmethod
    def not_yet(cls, name: str) -> Mapping[Any, str]:
        """Values of a field that works which do not work so far, see `NotYet`."""
        return next((m.values for m in cls.model_fields[name].metadata if isinstance(m, NotYet)), {})

    @classmethod
    def is_secret(cls, name: str) -> bool:
        """Whether the value must not be shown."""
        return any(isinstance(m, Secret) for m in cls.model_fields[name].metadata)

    def check_supported(self) -> None:
        """Raises `UnsupportedFeatureError` for the first value that does not work so far."""
        for name, field in type(self).model_fields.items():
            state, value = self.state(name), getattr(self, name)
            if isinstance(state, Unsupported) and value != field.get_default(call_default_factory=True) and value not in state.values:
                raise UnsupportedFeatureError(name, value, state.works)
            later = self.not_yet(name)
            if later and isinstance(value, Hashable) and value in later:
                raise UnsupportedFeatureError(name, value, later[value])
