#!/usr/bin/env python3
"""What this machine can do, and what of it a workload needs: the denominators of every share of a limit. Prints one line of JSON.

read_bytes_s   one pass over 1 GiB, by torch
flop_s         a product of 4096 x 2048 x 2048, by torch, of bfloat16 or float32, whichever is faster: CPUs without instructions for
               bfloat16 can widen it
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

RUNS = 9


def median_s(function: Callable[[], object]) -> float:
    """Of a few calls, after one that does not count."""
    function()
    seconds = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def limits() -> dict[str, float]:
    """Of as many threads as this process may use."""
    import torch

    x = torch.randn(2**28)
    pairs = [(torch.randn(4096, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    product_s = min(median_s(lambda pair=pair: torch.nn.functional.linear(*pair)) for pair in pairs)
    return {"read_bytes_s": x.numel() * 4 / median_s(x.sum), "flop_s": 2 * 4096 * 2048 * 2048 / product_s}


def in_words(found: Mapping[str, float]) -> str:
    """What `limits` gave."""
    return f"this machine reads {found['read_bytes_s'] / 1e9:.1f} GB/s and multiplies {found['flop_s'] / 1e12:.2f} TFLOP/s"


class Shape:
    """What a model's forward costs, from its config.json; a decoder with gated feed-forward layers and a tied embedding.

    Attributes:
        weight_bytes: of the checkpoint.
        kv_bytes: of one token.
        layer_flop: of one token, without attention.
        logits_flop: of one row of logits.
        attention_flop: of one token and one that it sees.
    """

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads, dim, layers = config["num_key_value_heads"], config.get("head_dim") or hidden // heads, config["num_hidden_layers"]
        per_layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
        self.weight_bytes = (directory / "model.safetensors").stat().st_size
        self.kv_bytes = layers * 2 * kv_heads * dim * 2
        self.layer_flop = 2 * layers * per_layer
        self.attention_flop = 4 * layers * heads * dim
        self.logits_flop = 2 * config["vocab_size"] * hidden


def batch_s(shape: Mapping[str, float], amounts: Mapping[str, float], found: Mapping[str, float]) -> float:
    """Least seconds of a batch: all products at the machine's rate, and for each output token the keys and values before it read once.

    Args:
        shape: of the model, a `Shape` as a dict.
        amounts: what `bench_engine` says of its requests.
        found: `limits`.
    """
    tokens, new = amounts["prompt_tokens"] + amounts["output_tokens"], amounts["output_tokens"]
    flop = tokens * shape["layer_flop"] + new * shape["logits_flop"]
    return flop / found["flop_s"] + amounts["read_kv_tokens"] * shape["kv_bytes"] / found["read_bytes_s"]


if __name__ == "__main__":
    print(json.dumps(limits()))
