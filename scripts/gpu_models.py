"""Small random models for `scripts/gpu_check`, whose output does not repeat itself: so that a wrong number changes a token."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VOCABULARY = 4096
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "intermediate_size": 768, "num_hidden_layers": 4, "max_position_embeddings": 4096, "dtype": "bfloat16",
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"hidden_size": 320, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}),
    "mistral": ("MistralForCausalLM", {"hidden_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 80,
                                       "sliding_window": 200}),
}
"""Names to architectures and what their config.json says: heads of 64, 80 and 128, 5, 2 and 2 query heads a kv head, a window."""


def model(folder: Path, name: str, **changes: Any) -> Path:
    """Make the checkpoint of a name in `MODELS`, in bfloat16: float32 runs compute with the same weights."""
    from safetensors.torch import load_file, save_file

    from kvloom.testing.checkpoints import make_checkpoint

    architecture, config = MODELS[name]
    directory = make_checkpoint(folder / name, architecture, tokenizer=False, **{**COMMON, **config, **changes})
    save_file(_lively(load_file(directory / "model.safetensors")), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _lively(weights: dict[str, Any]) -> dict[str, Any]:
    """Every layer changes its input by about as much as there is of it, and logits have a standard deviation of 2."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.dim() == 2:
            scale = 1.0 if "embed" in name else (2.0 if "lm_head" in name else 1.5) / math.sqrt(weight.shape[1])
            weights[name] = (torch.randn(weight.shape, generator=generator) * scale).to(weight.dtype)
    return weights


def random_ids(sizes: Sequence[int], seed: int, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Prompts of these lengths: the same for the same arguments."""
    numbers = random.Random(seed)
    return [[numbers.randrange(vocabulary) for _ in range(size)] for size in sizes]


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random ids, of one token and of `longest` and of lengths between."""
    numbers = random.Random(seed)
    return random_ids([1, longest, *(numbers.randint(2, longest) for _ in range(count))][:count], seed)
