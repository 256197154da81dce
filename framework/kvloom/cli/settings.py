"""``--file`` and ``--set`` to a configuration."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from kvloom.config import EngineConfig
from kvloom.errors import ConfigError


def read_config(arguments: argparse.Namespace, **more: Any) -> EngineConfig:
    """The configuration that the options describe; `more` wins.

    Raises:
        ConfigError: an option that is no ``name=value``, or what the configuration refuses.
    """
    values = dict(_setting(text) for text in arguments.set) | more
    return EngineConfig.from_file(arguments.file, **values) if arguments.file else EngineConfig.from_kwargs(**values)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: expected NAME=VALUE, e.g. --set max_model_len=4096")
    try:
        return name.strip().replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: {error}") from error
