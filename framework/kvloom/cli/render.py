"""``kvloom render MODEL [TEXT]``: what the model's chat template makes of messages. Reads the tokenizer only, no weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kvloom.cli.settings import read_config
from kvloom.config.checkpoint import resolve_model_dir
from kvloom.errors import ConfigError
from kvloom.startup import load_config_plugins
from kvloom.text.chat import ChatFormatter, ChatOptions
from kvloom.text.templates import TemplateRenderer
from kvloom.text.tokenizer import import_tokenizer, open_tokenizer


def render(arguments: argparse.Namespace) -> int:
    """Print the text, then the token ids."""
    config = read_config(arguments, model=arguments.model)
    messages = _messages(arguments)
    tokenizer_class = import_tokenizer(config, load_config_plugins(config).registries["tokenizers"])
    if tokenizer_class is None:
        raise ConfigError("skip_tokenizer_init leaves nothing to render with")
    m = config.model
    tokenizer = open_tokenizer(config, resolve_model_dir(m.model, m.revision, m.download_dir, m.hf_token, m.fetch), tokenizer_class)
    formatter = ChatFormatter(tokenizer, TemplateRenderer(), m.chat_template, m.allowed_local_media_path)
    try:
        rendered = formatter.render(messages, ChatOptions(
            arguments.chat_template, add_generation_prompt=not arguments.continue_final_message,
            continue_final_message=arguments.continue_final_message, tools=_read_json(arguments.tools) if arguments.tools else None))
    finally:
        formatter.close()
    if arguments.json:
        print(json.dumps({"prompt": rendered.prompt, "prompt_token_ids": rendered.prompt_token_ids}))
    else:
        print(rendered.prompt)
        print(*rendered.prompt_token_ids)
    return 0


def _messages(arguments: argparse.Namespace) -> Any:
    """From the text of one user message, or a JSON file. Raises `ConfigError` for both or none."""
    if (arguments.text is None) == (arguments.messages is None):
        raise ConfigError("give TEXT (one user message) or --messages FILE (a JSON list of messages)")
    return [{"role": "user", "content": arguments.text}] if arguments.messages is None else _read_json(arguments.messages)


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
