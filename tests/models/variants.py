"""Small configurations with awkward sizes, as transformers builds them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers

BASE = {"vocab_size": 101, "hidden_size": 60, "intermediate_size": 92, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None, "tie_word_embeddings": False}


def rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **values}}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha-untied": ("Llama", {"num_key_value_heads": 6}),
    "llama-gqa-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 14}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", rope("linear", factor=3.0)),
    "llama-dynamic": ("Llama", rope("dynamic", factor=2.0)),
    "llama3": ("Llama", rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
    "llama-yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 10}),
    "mistral-window": ("Mistral", {"sliding_window": 21, "head_dim": 10}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-windowed-upper-layers": ("Qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 18}),
    "qwen3-tied-windowed": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 30,
                                      "max_window_layers": 2}),
}


def make(variant: str, directory: Path, seed: int = 0) -> torch.nn.Module:
    """Save a random checkpoint, return transformers' model of it. Weights are scaled so that logits are spread over tens."""
    family, changes = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**BASE | changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=generator))
            elif p.dim() == 1:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            else:
                scale = 1.0 if "embed" in name or "lm_head" in name else 1.5 / math.sqrt(p.shape[1])
                p.copy_(scale * torch.randn(p.shape, generator=generator))
    model.save_pretrained(directory)
    return model
