"""Mistral (Jiang et al., 2023): Llama with a sliding window, which `MistralConfig` answers for each layer."""

from __future__ import annotations

from kvloom_models.decoder import CausalLM
from kvloom_models.labels import SequenceClassifier
from kvloom_models.llama import LlamaLayer


class MistralForCausalLM(CausalLM):
    """Mistral 7B and its successors with this architecture name; later ones have no window."""

    layer_class = LlamaLayer


class MistralModel(MistralForCausalLM):
    """The same without an output head: for embeddings."""

    tasks = ("embed",)


class MistralForSequenceClassification(SequenceClassifier, MistralForCausalLM):
    """With a label head on the last token."""
