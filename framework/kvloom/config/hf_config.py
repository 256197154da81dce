"""What a function given as ``hf_overrides`` gets: config.json as an object with attributes and items."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Self

from kvloom.errors import ConfigError

Override = Mapping[str, Any] | Callable[[Any], Any]
"""Keys that are set on config.json, or a function that changes it."""


class HfConfig(dict[str, Any]):
    """config.json. ``c.hidden_size`` and ``c["hidden_size"]`` are one thing, to read, to set and to delete; so in its objects.

    It has what scripts use of transformers' class: ``update``, ``get``, ``to_dict``. Nothing of it is code.
    """

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Self:
        """A copy, objects inside it too."""
        return cls({k: cls.of(v) if isinstance(v, Mapping) else v for k, v in value.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config.json has no {name!r} (it has {', '.join(sorted(self))})") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_dict(self) -> dict[str, Any]:
        """A plain copy."""
        return {k: v.to_dict() if isinstance(v, HfConfig) else v for k, v in self.items()}


def overridden(raw: Mapping[str, Any], override: Override | None) -> dict[str, Any]:
    """config.json's content with `override` on top.

    Raises:
        ConfigError: a function raised, or gave something that is no configuration; or values that JSON does not have.
    """
    if override is None:
        return dict(raw)
    changed = {**raw, **override} if isinstance(override, Mapping) else _called(override, raw)
    try:
        changed = json.loads(json.dumps(changed, allow_nan=False))  # a copy: the function may keep what it gave
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"hf_overrides: config.json can only hold what JSON has: {str(error)[:200]}") from error
    return _with_rope(raw, changed)


def _called(function: Callable[[Any], Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    try:
        result = function(HfConfig.of(raw))
    except Exception as error:
        raise ConfigError(f"hf_overrides: the function raised {type(error).__name__}: {error}") from error
    if hasattr(type(result), "to_dict"):  # ours, or a transformers configuration
        result = result.to_dict()
    if not isinstance(result, Mapping):
        raise ConfigError(f"hf_overrides: the function must return the configuration, it returned {type(result).__name__}")
    return dict(result)


def _with_rope(before: Mapping[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` that were changed win over the ``rope_parameters`` of a newer file."""
    rope = after.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return after
    base: dict[str, Any] = dict(rope)
    scaling = after.get("rope_scaling")
    if scaling != before.get("rope_scaling"):
        base = {k: v for k, v in base.items() if k in ("rope_theta", "partial_rotary_factor")} | dict(scaling or {})
    if after.get("rope_theta") != before.get("rope_theta"):
        base["rope_theta"] = after.get("rope_theta")
    return {**after, "rope_parameters": base}
