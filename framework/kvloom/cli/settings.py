"""``--file``, ``--set`` and ``--param`` to a configuration and to parameters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import yaml

from kvloom.config import EngineConfig
from kvloom.errors import ConfigError


def read_config(arguments: argparse.Namespace, **more: Any) -> EngineConfig:
    """The configuration that the options describe; `more` wins.

    Raises:
        ConfigError: an option that is no ``name=value``, or what the configuration refuses.
    """
    values = read_values("--set", arguments.set) | more
    return EngineConfig.from_file(arguments.file, **values) if arguments.file else EngineConfig.from_kwargs(**values)


def read_values(option: str, given: Sequence[str]) -> dict[str, Any]:
    """``name=value`` texts, values as YAML. Raises `ConfigError` for others."""
    return dict(_setting(option, text) for text in given)


def _setting(option: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{option} {text}: expected NAME=VALUE, e.g. --set max_model_len=4096")
    try:
        return name.strip().replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} {text}: {' '.join(str(error).split())}") from error
