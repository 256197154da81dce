"""Small random checkpoints with a tokenizer, made on the spot: for plugin tests and demonstrations. No download."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BYTES = 256
BOS, EOS = BYTES, BYTES + 1
VOCAB_SIZE = 288
SMALL: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "bos_token_id": BOS, "eos_token_id": EOS, "dtype": "float32",
}
"""config.json of the default checkpoint."""


def make_checkpoint(directory: Path, architecture: str = "LlamaForCausalLM", *, tokenizer: bool = True, **config: Any) -> Path:
    """Write config.json, random weights and a byte-level tokenizer.

    Args:
        directory: is made.
        architecture: any that an installed plugin registers.
        tokenizer: whether to write one: ids 0..255 are bytes, then begin and end of text.
        config: keys of config.json on top of `SMALL`.

    Returns:
        `directory`.

    Raises:
        PluginError, ModelError: see `kvloom.errors`.
    """
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    model_type = architecture.removesuffix("ForCausalLM").lower()
    content = {"architectures": [architecture], "model_type": model_type, **SMALL, **config}
    (directory / "config.json").write_text(json.dumps(content, indent=1))
    save_file(_random_weights(directory), directory / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        _write_tokenizer(directory)
    return directory


def _random_weights(directory: Path) -> dict[str, Any]:
    """What the architecture's plugin asks for, as the dummy loader makes it up."""
    import torch

    from kvloom.config import EngineConfig
    from kvloom.runtime.builder import build_model, open_source
    from kvloom.runtime.comm import LocalComm
    from kvloom.runtime.model_plan import make_loader
    from kvloom.runtime.weights import wanted_tensors
    from kvloom.startup import load_config_plugins

    config = EngineConfig.from_kwargs(model=str(directory), load_format="dummy")
    plugins = load_config_plugins(config)
    built = build_model(config, plugins, open_source(config, plugins), torch.device("meta"), LocalComm())
    loader = make_loader(config, plugins)
    return dict(loader.read(list(loader.catalog(directory, wanted_tensors(built.model)))))


def _write_tokenizer(directory: Path) -> None:
    """A byte-level BPE without merges: every text can be encoded, every byte is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    names = {**{_byte_name(b): b for b in range(BYTES)}, "<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}))


def _byte_name(byte: int) -> str:
    """The printable character that stands for a byte in byte-level BPE: itself where it is printable, else one from 256 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in kept:
        return chr(byte)
    return chr(256 + [b for b in range(BYTES) if b not in kept].index(byte))
