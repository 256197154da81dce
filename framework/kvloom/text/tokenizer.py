"""Opening the tokenizer that the configuration asks for."""

from __future__ import annotations

from pathlib import Path

from kvloom.config import EngineConfig
from kvloom.config.checkpoint import resolve_model_dir
from kvloom.errors import ConfigError, NotRegisteredError
from kvloom.hooks.registry import Registry
from kvloom.interfaces.tokenizer import Tokenizer


def open_tokenizer(config: EngineConfig, model_dir: Path, registry: Registry[Tokenizer]) -> Tokenizer | None:
    """The tokenizer, None with ``skip_tokenizer_init``.

    Args:
        model_dir: the checkpoint's directory: the tokenizer is there unless `tokenizer` names another place.

    Raises:
        ConfigError: a ``tokenizer_mode`` that nobody registered.
        ModelError: there is no usable tokenizer in the directory.
    """
    m = config.model
    if m.skip_tokenizer_init:
        return None
    try:
        entry = registry.resolve(m.tokenizer_mode)
    except NotRegisteredError as error:
        raise ConfigError(f"Unknown tokenizer mode {m.tokenizer_mode!r}: {error}") from error
    directory = model_dir
    if m.tokenizer is not None or m.tokenizer_revision not in (None, m.revision):
        directory = resolve_model_dir(m.tokenizer or m.model, m.tokenizer_revision or m.revision, m.download_dir, m.hf_token)
    return entry.load()(directory, trust_remote_code=m.trust_remote_code)
