"""A deployment's YAML file: keys with the line where each stands, so that a mistake can be pointed at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kvloom.errors import ConfigError

MAX_FILE_BYTES = 1_000_000


class FileValue(NamedTuple):
    """One top-level key's value and line (from 1)."""

    value: Any
    line: int


def read_yaml(path: Path) -> dict[str, FileValue]:
    """Top-level keys of a file. Only plain data: tags that make objects are refused.

    Raises:
        ConfigError: no such file, too large, no mapping, a key twice, or not valid YAML; with the line where there is one.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: a configuration file has at most {MAX_FILE_BYTES} bytes")
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected `name: value` lines")
        values: dict[str, FileValue] = {}
        for key_node, value_node in root.value:
            key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str) or key in values:
                raise ConfigError(f"{path}:{line}: {key!r} is " + ("there twice" if isinstance(key, str) else "not a name"))
            values[key] = FileValue(loader.construct_object(value_node, deep=True), line)
        return values
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    finally:
        loader.dispose()
