"""Qwen2 and Qwen2.5 (Qwen Team, 2024): Llama with biases on query, key and value, and maybe windows in its upper layers."""

from __future__ import annotations

from kvloom_models.decoder import CausalLM
from kvloom_models.llama import LlamaLayer


class Qwen2ForCausalLM(CausalLM):
    """What differs from Llama is in `Qwen2Config`."""

    layer_class = LlamaLayer
