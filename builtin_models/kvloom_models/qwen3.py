"""Qwen3 (Qwen Team, 2025): queries and keys are normalised per head before the rotation."""

from __future__ import annotations

from kvloom.interfaces.model import BuildContext
from kvloom_models.config import DecoderConfig
from kvloom_models.decoder import CausalLM
from kvloom_models.labels import SequenceClassifier
from kvloom_models.llama import LlamaAttention, LlamaLayer


class Qwen3Layer(LlamaLayer):
    """A Llama layer whose attention has head norms."""

    def make_attention(self, config: DecoderConfig, build: BuildContext, index: int) -> LlamaAttention:
        """See `LlamaLayer.make_attention`."""
        return LlamaAttention(config, build, index, f"{self.prefix}.self_attn", head_norm_eps=config.rms_norm_eps)


class Qwen3ForCausalLM(CausalLM):
    """What else differs from Llama is in `Qwen3Config`."""

    layer_class = Qwen3Layer


class Qwen3Model(Qwen3ForCausalLM):
    """The same without an output head: for embeddings."""

    tasks = ("embed",)


class Qwen3ForSequenceClassification(SequenceClassifier, Qwen3ForCausalLM):
    """With a label head on the last token."""
