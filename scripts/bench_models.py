"""Checkpoints that the benchmarks run: real shapes, random weights, since speed does not depend on the values."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "dtype": "bfloat16"}
"""SmolLM2-135M's shape."""

QWEN3: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "dtype": "bfloat16"}
"""Qwen3-0.6B's shape."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-135m": ("LlamaForCausalLM", LLAMA),
    "llama-135m-long": ("LlamaForCausalLM", {**LLAMA, "max_position_embeddings": 40960}),
    "llama-135m-text": ("LlamaForCausalLM", LLAMA),
    "qwen3-0.6b": ("Qwen3ForCausalLM", QWEN3),
}


def model(folder: Path, name: str) -> Path:
    """The checkpoint of a name in `MODELS`; made where the folder has none. One with "-text" has a tokenizer."""
    directory = folder / name
    if not (directory / "model.safetensors").exists():
        from kvloom.testing.checkpoints import make_checkpoint

        architecture, config = MODELS[name]
        make_checkpoint(directory, architecture, tokenizer=name.endswith("-text"), **config)
        if name.endswith("-text"):
            make_words(directory, config["vocab_size"])
    return directory


def make_words(directory: Path, count: int) -> None:
    """A tokenizer of single bytes and random words, `count` in all; it decodes like a trained one."""
    from kvloom.testing.checkpoints import VOCAB_SIZE

    data = json.loads((directory / "tokenizer.json").read_text())
    numbers = random.Random(0)
    vocabulary = data["model"]["vocab"]
    while len(vocabulary) < count - VOCAB_SIZE:
        word = "".join(numbers.choices("abcdefghijklmnopqrstuvwxyz", k=numbers.randint(2, 9)))
        vocabulary.setdefault(("Ġ" if numbers.random() < 0.6 else "") + word, len(vocabulary) + VOCAB_SIZE)
    (directory / "tokenizer.json").write_text(json.dumps(data))
