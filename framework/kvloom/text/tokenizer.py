"""Opening the tokenizer that the configuration asks for."""

from __future__ import annotations

from pathlib import Path

from kvloom.config import EngineConfig
from kvloom.config.checkpoint import resolve_model_dir
from kvloom.config.other_values import instead
from kvloom.errors import ConfigError, NotRegisteredError, RequestTypeError, shown
from kvloom.hooks.registry import Registry
from kvloom.interfaces.tokenizer import Tokenizer


def import_tokenizer(config: EngineConfig, registry: Registry[Tokenizer]) -> type[Tokenizer] | None:
    """The class that ``tokenizer_mode`` names, None with ``skip_tokenizer_init``. Raises `ConfigError` when nobody registered it."""
    m = config.model
    if m.skip_tokenizer_init:
        return None
    try:
        return registry.resolve(m.tokenizer_mode).load()
    except NotRegisteredError as error:
        hint = instead("tokenizer_mode", m.tokenizer_mode)
        raise ConfigError(f"Unknown tokenizer mode {m.tokenizer_mode!r}{hint}: {error}") from error


def adopt_tokenizer(config: EngineConfig, registry: Registry[Tokenizer], given: object) -> Tokenizer:
    """`given` as it is, or in the class that ``tokenizer_mode`` names when it is that class's library's own object.

    Raises:
        RequestTypeError: it is neither.
    """
    if isinstance(given, Tokenizer):
        return given
    mode = registry.resolve(config.model.tokenizer_mode).load()
    adopted = mode.adopt(given)
    if adopted is None:
        raise RequestTypeError(f"set_tokenizer takes a kvloom.interfaces.Tokenizer, or an object that tokenizer_mode="
                               f"{config.model.tokenizer_mode!r} ({mode.__name__}) adopts, got {shown(given)}", "tokenizer", given)
    return adopted


def open_tokenizer(config: EngineConfig, model_dir: Path, tokenizer: type[Tokenizer]) -> Tokenizer:
    """Load the tokenizer.

    Args:
        model_dir: the checkpoint's directory: the tokenizer is there unless the configuration names another place.

    Raises:
        ModelError: there is no usable tokenizer in the directory.
    """
    m = config.model
    directory = model_dir
    if m.tokenizer is not None or m.tokenizer_revision not in (None, m.revision):
        directory = resolve_model_dir(m.tokenizer or m.model, m.tokenizer_revision or m.revision, m.download_dir, m.hf_token, m.fetch)
    return tokenizer(directory, trust_remote_code=m.trust_remote_code, code_revision=m.code_revision)
