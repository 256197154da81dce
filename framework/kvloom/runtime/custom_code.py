"""What a checkpoint's own Python code may do: describe its configuration, when the user trusts it. Its models are not run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvloom.config.hf_config import overridden
from kvloom.config.model import ModelSection
from kvloom.config.model_json import read_config_file, without_underscores
from kvloom.errors import ModelError, UnsupportedFeatureError
from kvloom.interfaces.remote_code import CODE_KEY, from_pretrained, named_code


def read_config(directory: Path, section: ModelSection) -> dict[str, Any]:
    """config.json as the model's plugin will see it: the file, or what the checkpoint's own class makes of it when that is trusted,
    then ``hf_overrides``, ``rope_scaling`` and ``rope_theta``.

    Raises:
        ModelError: it cannot be read, or the checkpoint's class fails.
        ConfigError: overrides that make no sense.
    """
    raw = read_config_file(directory)
    if section.trust_remote_code and named_code(directory, "config.json", "AutoConfig") is not None:
        raw = {**raw, **_of_own_class(directory, section.code_revision)}
    raw = overridden(raw, section.hf_overrides)
    given = {"rope_scaling": section.rope_scaling, "rope_theta": section.rope_theta}
    return without_underscores(overridden(raw, {k: v for k, v in given.items() if v is not None}))


def _of_own_class(directory: Path, code_revision: str | None) -> dict[str, Any]:
    import transformers

    try:
        config = from_pretrained(transformers.AutoConfig, directory, trust_remote_code=True, code_revision=code_revision)
        return {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", CODE_KEY)}
    except Exception as error:
        raise ModelError(f"the configuration class that comes with {directory} failed: {type(error).__name__}: {error}") from error


def refuse_custom_model(raw: Mapping[str, Any], section: ModelSection) -> None:
    """For a model whose architecture nobody registered. Raises `UnsupportedFeatureError` when the checkpoint brings it as code."""
    code = raw.get(CODE_KEY)
    if isinstance(code, Mapping) and any(str(name).startswith("AutoModel") for name in code):
        architectures = ", ".join(map(str, raw.get("architectures") or ["its architecture"]))
        raise UnsupportedFeatureError(
            "trust_remote_code", section.trust_remote_code,
            f"the model's code comes with the checkpoint, and such code is never run: install a plugin that registers {architectures}")
