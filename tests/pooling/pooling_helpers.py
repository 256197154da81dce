"""Random checkpoints of transformers for pooling, and engines over them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kvloom import LLM
from kvloom.interfaces import Step

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


def as_reward_model(directory: Path) -> None:
    """Of a Qwen2 checkpoint with a label head: transformers has no such architecture, which has two layers in the place of one."""
    path = directory / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith("score")}
    shapes = {"score.0.weight": (HIDDEN, HIDDEN), "score.0.bias": (HIDDEN,), "score.2.weight": (1, HIDDEN), "score.2.bias": (1,)}
    generator = torch.Generator().manual_seed(11)
    save_file(tensors | {n: 0.3 * torch.randn(s, generator=generator) for n, s in shapes.items()}, path, metadata={"format": "pt"})
    edit(directory, architectures=["Qwen2ForRewardModel"])


@contextmanager
def recorded_steps(llm: LLM) -> Iterator[list[Step]]:
    """Every step that reaches the executor meanwhile."""
    executor, steps = llm.llm_engine.executor, []
    submit = executor.submit
    executor.submit = lambda step: steps.append(step) or submit(step)
    try:
        yield steps
    finally:
        del executor.submit


def assert_idle(llm: LLM) -> None:
    """Nothing is under way and no block is lost."""
    scheduler = llm.llm_engine.engine.scheduler
    scheduler.check_integrity()
    assert not llm.llm_engine.has_work
    assert scheduler.num_free_blocks == scheduler.num_usable_blocks


def write_tokenizer(directory: Path) -> None:
    """Words w0..w95, two special tokens around a text and one between two, and padding."""
    words = {**{f"w{i}": i for i in range(4, VOCAB)}, "<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}')


def make_embedder(directory: Path) -> torch.nn.Module:
    """A model whose embeddings may be cut to 16, with a tokenizer."""
    model = make(directory, matryoshka_dimensions=[16])
    write_tokenizer(directory)
    return model


def make_cross_encoder(directory: Path) -> torch.nn.Module:
    """A model with one label, with a tokenizer."""
    model = make(directory, kind="ForSequenceClassification", num_labels=1)
    write_tokenizer(directory)
    return model
