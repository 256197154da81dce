"""Trains the demo model on a CPU and writes its directory: ``python -m demo_model.train``, or scripts/train_demo_model."""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from demo_model import corpus
from demo_model.chat import BOS, END, SPECIAL_TOKENS
from demo_model.evaluate import shares_right
from demo_model.packing import Batch, batches, encode
from demo_model.tokenizer import VOCAB_SIZE, save_tokenizer, train_tokenizer

MODEL_DIR = Path(__file__).resolve().parents[2] / "framework/kvloom/demo/model"
MAX_TOKENS = 1024
STEPS = 2400
PEAK_LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 2.5e-3, 150, 0.05
LOG_EVERY = 100
CONFIG_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
               "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias")


def make_model() -> LlamaForCausalLM:
    """Random weights; 2.9 million parameters with sizes that are multiples of 128."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=MAX_TOKENS, rms_norm_eps=1e-5, tie_word_embeddings=True,
        initializer_range=0.04, bos_token_id=SPECIAL_TOKENS.index(BOS), eos_token_id=SPECIAL_TOKENS.index(END),
        attn_implementation="sdpa")
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy over the places that have a target: only those go through the head."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch.tokens, position_ids=batch.positions, attention_mask=batch.mask,
                             use_cache=False).last_hidden_state
        chosen = batch.targets >= 0
        logits = model.lm_head(hidden[chosen])
    return F.cross_entropy(logits.float(), batch.targets[chosen])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, documents: Sequence[str], steps: int, seed: int) -> float:
    """Trains in place and prints the loss curve. Returns the mean loss of the last `LOG_EVERY` steps."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
                                  betas=(0.9, 0.99), fused=True)
    source = batches(encode(tokenizer, documents), seed)
    start, total, mean = time.perf_counter(), 0.0, math.nan
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(model, next(source))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % LOG_EVERY == 0:
            mean, total = total / LOG_EVERY, 0.0
            print(f"step {step + 1:5} of {steps}  loss {mean:.4f}  {time.perf_counter() - start:6.0f} s", flush=True)
    return mean


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """A checkpoint in Hugging Face format, weights in bfloat16. The head is the embedding, so it is not stored."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    (directory / "model.safetensors").write_bytes(safetensors.torch.save(weights, {"format": "pt"}))
    ends = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    write_json(directory / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "rope_theta": 10000.0, **ends,
        **{name: getattr(model.config, name) for name in CONFIG_KEYS}})
    write_json(directory / "generation_config.json", {**ends, "do_sample": False})
    save_tokenizer(tokenizer, directory, MAX_TOKENS)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """One key a line."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    """Trains, saves, asks the questions that the text lacks, and notes the figures in training.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=corpus.SEED)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    start = time.perf_counter()
    documents = corpus.documents(arguments.seed)
    tokenizer = train_tokenizer(documents)
    model = make_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(documents)} documents, {sum(map(len, documents)) / 1e6:.1f} million characters, {parameters} parameters", flush=True)
    loss = train(model, tokenizer, documents, arguments.steps, arguments.seed)
    seconds = time.perf_counter() - start
    save(model, tokenizer, arguments.out)
    figures = {
        "seed": arguments.seed, "corpus_sha256": corpus.sha256(documents), "documents": len(documents), "parameters": parameters,
        "safetensors_bytes": (arguments.out / "model.safetensors").stat().st_size, "steps": arguments.steps,
        "seconds": round(seconds), "threads": arguments.threads, "final_loss": round(loss, 4), **shares_right(arguments.out),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                     "tokenizers": tokenizers.__version__},
    }
    write_json(arguments.out / "training.json", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
