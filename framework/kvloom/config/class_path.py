"""Classes that a parameter names: the class itself, or the text ``package.module:Class`` (``package.module.Class`` as vLLM has it)."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

from pydantic import BeforeValidator

from kvloom.errors import ConfigError


def _check(value: Any) -> Any:
    if value is None or isinstance(value, type):
        return value
    if not isinstance(value, str) or not all(part.isidentifier() for part in value.replace(":", ".", 1).split(".")) or (
            "." not in value and ":" not in value):
        raise ValueError("must be a class, or a text such as 'package.module:Class'")
    return value


ClassPath = Annotated[Any, BeforeValidator(_check)]
"""Type of a parameter that names a class; None is none. Nothing is imported when it is checked."""


def load_class(parameter: str, given: type | str, contract: type | None = None) -> type[Any]:
    """The class that `given` is or names.

    Args:
        parameter: that names it, for messages.
        contract: what it must be a subclass of.

    Raises:
        ConfigError: it cannot be imported, with its own exception as the cause, or it is no class of this kind.
    """
    found: Any = given
    if isinstance(given, str):
        module, _, name = given.partition(":") if ":" in given else given.rpartition(".")
        try:
            found = getattr(import_module(module), name)
        except Exception as error:
            raise ConfigError(f"{parameter}={given!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(found, type) or (contract is not None and not issubclass(found, contract)):
        wanted = "a class" if contract is None else f"a subclass of {contract.__module__}.{contract.__qualname__}"
        raise ConfigError(f"{parameter}={given!r} must be {wanted}, it is {found!r}")
    return found


def make_instance(parameter: str, given: type | str, contract: type[Any]) -> Any:
    """An object of the class that `given` is or names, made without arguments.

    Raises:
        ConfigError: see `load_class`; or it cannot be made so, with its own exception as the cause.
    """
    found = load_class(parameter, given, contract)
    try:
        return found()
    except Exception as error:
        raise ConfigError(f"{parameter}={given!r}: an object of it cannot be made: {type(error).__name__}: {error}") from error
