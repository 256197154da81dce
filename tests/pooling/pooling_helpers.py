"""Random checkpoints of transformers for pooling, and engines over them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from kvloom import LLM

VOCAB, HIDDEN, POSITIONS = 101, 60, 256
SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 92, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = {"Llama": {}, "Mistral": {"sliding_window": 21, "head_dim": 10}, "Qwen2": {}, "Qwen3": {"head_dim": 18}}


def make(directory: Path, family: str = "Llama", kind: str = "ForCausalLM", **config: Any) -> torch.nn.Module:
    """Save a random checkpoint; transformers' model of it."""
    settings = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **config})
    settings._attn_implementation = "eager"
    model = getattr(transformers, f"{family}{kind}")(settings).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if p.dim() == 1 else 1.0 if "embed" in name else 1.5 / math.sqrt(p.shape[1])
            p.copy_((1 if "norm" in name else 0) + scale * torch.randn(p.shape, generator=generator))
    model.save_pretrained(directory)
    return model


def edit(directory: Path, **config: Any) -> None:
    """Change keys of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def rename(directory: Path, change) -> None:
    """Rename the checkpoint's tensors."""
    path = directory / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def engine(directory: Path, **values: Any) -> LLM:
    return LLM(str(directory), **{"dtype": "float32", "skip_tokenizer_init": True} | values)


def prompts_of(count: int, longest: int = 90) -> list[list[int]]:
    numbers = random.Random(count)
    return [[numbers.randrange(1, VOCAB) for _ in range(numbers.randint(1, longest))] for _ in range(count)]


def hidden_of(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    """transformers' last hidden states, ``[tokens, H]``."""
    with torch.no_grad():
        return model.base_model(torch.tensor([prompt])).last_hidden_state[0]


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


def vectors(outputs: list) -> torch.Tensor:
    return torch.tensor([o.outputs.embedding for o in outputs])


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=1e-5, rtol=1e-5)


def free_blocks(llm: LLM) -> tuple[float, float]:
    stats = llm.llm_engine.stats()
    return stats["free_blocks"], stats["total_blocks"]


