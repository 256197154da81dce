"""Sampling defaults and end tokens of a checkpoint: generation_config.json, and what the configuration puts on top."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvloom.config.model_json import read_json
from kvloom.errors import ConfigError, ModelError, RequestValidationError, shown
from kvloom.near import did_you_mean
from kvloom.params import SamplingParams

FIELDS: Mapping[str, str] = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Key of generation_config.json -> field of `SamplingParams`. Other keys steer transformers and mean nothing here."""
FILE = "generation_config.json"
NO_FILE = "vllm"
"""``generation_config=`` of engines that only have vLLM's defaults."""


def read_generation(directory: Path, source: str, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Key -> value.

    Args:
        directory: of the checkpoint.
        source: ``generation_config=``: "auto" reads the checkpoint's file if there is one, "vllm" reads none, else a folder.
        overrides: ``override_generation_config=``, on top.

    Raises:
        ConfigError: no such folder or file, or an override of something else.
        ModelError: the file cannot be read.
    """
    found: dict[str, Any] = {}
    if source != NO_FILE:
        path = (directory if source == "auto" else Path(source)) / FILE
        if path.is_file():
            found = read_json(path)
        elif source != "auto":
            raise ConfigError(f"generation_config={source!r}: there is no {path}; give 'auto', 'vllm' or a folder with {FILE}")
    known = [*FIELDS, "eos_token_id"]
    for name in overrides or {}:
        if name not in known:
            raise ConfigError(f"override_generation_config: unknown key {name!r}{did_you_mean(name, known)} (keys: {', '.join(known)})")
    return {**found, **(overrides or {})}


def default_sampling(generation: Mapping[str, Any]) -> SamplingParams:
    """What requests without parameters get: `SamplingParams`' own defaults where `generation` says nothing.

    Raises:
        ModelError: a value that no request may have.
    """
    values = {field: generation[key] for key, field in FIELDS.items() if generation.get(key) is not None}
    try:
        return SamplingParams(**values)
    except RequestValidationError as error:
        raise ModelError(f"{FILE} (or override_generation_config): {error}") from error


def end_tokens(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Token ids that end a text: config.json's ``eos_token_id``, then generation_config.json's, without duplicates.

    Raises:
        ModelError: an id that is no integer.
    """
    found: list[int] = []
    for source in (raw, generation):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token_id) is not int or token_id < 0:
                raise ModelError(f"eos_token_id must be a token id or a list of them, got {shown(value)}")
            if token_id not in found:
                found.append(token_id)
    return tuple(found)
