"""config.json: read as data, bounded, through an allow-list. transformers' classes are not used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from kvloom.errors import ModelError
from kvloom.interfaces.model_config import ModelConfig

MAX_JSON_BYTES = 16 * 2**20
C = TypeVar("C", bound=ModelConfig)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ModelError` for anything else, NaN and infinity included."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} has more than {MAX_JSON_BYTES} bytes")
        data = json.loads(path.read_text(), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {str(error)[:200]}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return data


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def without_underscores(raw: Mapping[str, Any]) -> dict[str, Any]:
    """transformers keeps what steers its own code under such keys: nobody may set them from a file."""
    return {k: v for k, v in raw.items() if not k.startswith("_")}


def read_config_file(directory: Path) -> dict[str, Any]:
    """config.json as it is, but for keys that start with an underscore. Raises `ModelError` where there is none."""
    path = directory / "config.json"
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
        raise ModelError(f"{directory} has no config.json (there is {there}); give the directory of a checkpoint in Hugging Face "
                         "format")
    return without_underscores(read_json(path))


def parse_model_config(raw: Mapping[str, Any], model: type[C]) -> C:
    """What `model` allows of config.json, checked.

    Raises:
        ModelError: with every wrong field.
    """
    data = dict(raw)
    data["rope"] = _rope(raw)
    data["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    data = {k: v for k, v in data.items() if v is not None or _may_be_null(model, k)}
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config.json'}: {e['msg']} (got {_short(e['input'])})"
                             for e in error.errors())
        raise ModelError(f"config.json cannot be used: {problems}") from error


def _may_be_null(model: type[ModelConfig], key: str) -> bool:
    """Whether null says something: for other fields it is the same as no key."""
    return key in model.model_fields and type(None) in get_args(model.model_fields[key].annotation)


def _short(value: object) -> str:
    return repr(value)[:80]


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` (new), or ``rope_theta`` and ``rope_scaling`` (old), in the names of the new one."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ModelError(f"config.json cannot be used: rope_scaling must be an object, got {_short(scaling)}")
    rope = {k: v for k, v in scaling.items() if v is not None}
    if "type" in rope:  # the oldest spelling
        rope.setdefault("rope_type", rope["type"])
    for name in ("rope_theta", "partial_rotary_factor"):
        if raw.get(name) is not None:
            rope.setdefault(name, raw[name])
    if raw.get("original_max_position_embeddings") is not None:
        rope.setdefault("original_max_position_embeddings", raw["original_max_position_embeddings"])
    return rope


def has_window(raw: Mapping[str, Any]) -> bool:
    """Whether some layers see only the last ``sliding_window`` tokens."""
    return type(raw.get("sliding_window")) is int and raw["sliding_window"] > 0 and raw.get("use_sliding_window", True) is not False


def without_window(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model in which every layer sees all tokens."""
    return {**{k: v for k, v in raw.items() if k not in ("use_sliding_window", "layer_types")}, "sliding_window": None}


def derive_max_model_len(config: ModelConfig) -> int:
    """Tokens that the model was made for: ``max_position_embeddings``, stretched where the rope type's factor counts from there.

    linear, dynamic: max_position_embeddings is the trained context, the factor stretches it. yarn: from the original context.
    llama3: max_position_embeddings is the stretched one already.
    """
    rope, trained = config.rope, config.max_position_embeddings - config.first_position
    if rope.rope_type in ("linear", "dynamic"):
        return int(trained * rope.factor)
    if rope.rope_type == "yarn":
        return max(trained, int((rope.original_max_position_embeddings or trained) * rope.factor))
    return trained

