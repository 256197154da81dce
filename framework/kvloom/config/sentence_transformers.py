"""What a checkpoint in the format of the sentence-transformers library says about pooling: ``modules.json`` and the folders it names.

Read as data; class paths in it are compared with names that are known, never imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvloom.config.model_json import MAX_JSON_BYTES, read_json
from kvloom.errors import ModelError, UnsupportedFeatureError, shown

MODES: Mapping[str, str] = {"pooling_mode_cls_token": "CLS", "pooling_mode_mean_tokens": "MEAN", "pooling_mode_lasttoken": "LAST"}
"""Key of the pooling folder's config.json -> pooling type."""
NAMED_MODES: Mapping[str, str] = {"cls": "CLS", "mean": "MEAN", "lasttoken": "LAST"}
"""The same as newer files have it, under ``pooling_mode``."""
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
"""Last part of the class paths that dense layers may name."""
ORDER = re.compile(r"Transformer( Pooling)?( Dense)*( Normalize)?")
"""Of a checkpoint's modules: what is computed in this order."""
MAX_WIDTH, MAX_MODULES = 2**20, 64
LIBRARY = "sentence_transformers."
"""What class paths begin with; another library's class of the same name may compute something else."""
SENTENCE = "sentence_embedding"
"""What dense layers read and write; others change the rows of tokens, before they are pooled."""


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """``activation(x [in] @ weight.T + bias) -> [out]`` after pooling; `directory` has ``linear.weight``, ``.bias``."""

    directory: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class SentenceModules:
    """What comes after the model.

    Args:
        pooling_type: None where no pooling module is named.
        normalize: whether the embedding gets length 1.
        max_tokens: longest prompt; None: the model's own.
        pooled_size: numbers that the pooling module says it is given; None: it does not say.
    """

    pooling_type: str | None
    dense: tuple[DenseLayer, ...]
    normalize: bool
    max_tokens: int | None
    pooled_size: int | None = None


def is_sentence_model(directory: Path) -> bool:
    """Whether the checkpoint comes with a ``modules.json``."""
    return (directory / "modules.json").is_file()


def read_modules(directory: Path, chosen: str | None) -> SentenceModules | None:
    """None without a ``modules.json``.

    Args:
        chosen: the pooling type that the caller chose: the checkpoint's own is not read then.

    Raises:
        ModelError: a file that cannot be read, or folders outside the checkpoint.
        UnsupportedFeatureError: a module that is not known.
    """
    if not is_sentence_model(directory):
        return None
    pooling_type: str | None = None
    pooled_size: int | None = None
    dense: list[DenseLayer] = []
    kinds: list[str] = []
    for module in _listed(directory / "modules.json"):
        kind, folder = _kind(module), _inside(directory, module.get("path", ""))
        kinds.append(kind)
        if kind == "Pooling" and chosen is None:
            config = read_json(folder / "config.json")
            pooling_type, pooled_size = _pooling_type(config), _size(config, "word_embedding_dimension", folder)
        elif kind == "Dense":
            dense.append(_dense(folder))
    if not ORDER.fullmatch(" ".join(kinds)):
        raise UnsupportedFeatureError("modules.json", ", ".join(kinds) or "an empty list", "a checkpoint may have Transformer, then "
                                      "maybe Pooling, then any number of Dense, then maybe Normalize")
    return SentenceModules(pooling_type, tuple(dense), "Normalize" in kinds, _max_tokens(directory), pooled_size)


def _listed(path: Path) -> list[dict[str, Any]]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} has more than {MAX_JSON_BYTES} bytes")
        modules = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {str(error)[:200]}") from error
    if not isinstance(modules, list) or len(modules) > MAX_MODULES or not all(isinstance(m, dict) for m in modules):
        raise ModelError(f"{path} must hold a list of at most {MAX_MODULES} objects")
    return modules


def _kind(module: Mapping[str, Any]) -> str:
    """The last part of its class path; the whole path of what is not the library's."""
    path = str(module.get("type", ""))
    return path.rpartition(".")[2] if path.startswith(LIBRARY) else path


def _inside(directory: Path, name: object) -> Path:
    """A folder of the checkpoint. Its own links may lead out of it (the hub's cache), a name may not."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(f"modules.json names the folder {shown(name)}, which is not inside the checkpoint")
    return directory / name


def _pooling_type(config: Mapping[str, Any]) -> str:
    named = config.get("pooling_mode")
    on = [named] if isinstance(named, str) else [k for k, v in config.items() if k.startswith("pooling_mode_") and v is True]
    found = {**MODES, **NAMED_MODES}.get(on[0]) if len(on) == 1 else None
    if found is None:
        raise UnsupportedFeatureError("pooling of the checkpoint", on, "it may be one of cls, mean and last token; choose one with "
                                      "override_pooler_config")
    return found


def _dense(folder: Path) -> DenseLayer:
    config = read_json(folder / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise UnsupportedFeatureError(f"{folder.name}: activation_function", activation, f"it may be {', '.join(ACTIVATIONS)}")
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, SENTENCE):
            raise UnsupportedFeatureError(f"{folder.name}: {name}", config[name], f"dense layers may only read and write {SENTENCE}")
    in_features, out_features = (_size(config, name, folder) for name in ("in_features", "out_features"))
    if in_features is None or out_features is None:
        raise ModelError(f"{folder / 'config.json'} must have in_features and out_features")
    return DenseLayer(folder, in_features, out_features, config.get("bias", True) is True, activation)


def _size(config: Mapping[str, Any], name: str, folder: Path) -> int | None:
    value = config.get(name)
    if value is not None and not (type(value) is int and 0 < value <= MAX_WIDTH):
        raise ModelError(f"{folder / 'config.json'}: {name} must be a size of at most {MAX_WIDTH}, got {shown(value)}")
    return value


def _max_tokens(directory: Path) -> int | None:
    path = directory / "sentence_bert_config.json"
    config = read_json(path) if path.is_file() else {}
    if config.get("do_lower_case"):
        raise UnsupportedFeatureError(f"{path.name}: do_lower_case", True, "lower the texts and set it to false")
    most = config.get("max_seq_length")
    if most is not None and not (type(most) is int and most > 0):
        raise ModelError(f"{path}: max_seq_length must be a number of tokens, got {shown(most)}")
    return most
