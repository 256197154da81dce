"""Registers our model families under their config.json architecture names. Imports no torch."""

from __future__ import annotations

from kvloom import hookimpl
from kvloom.interfaces.registrar import Registrar

KVLOOM_API = {"models": 0}


@hookimpl
def kvloom_register_models(registry: Registrar) -> None:
    """One line an architecture: the model class, and the config.json keys that it may see."""
    for architecture, module, config in (
        ("LlamaForCausalLM", "llama", "LlamaConfig"),
        ("MistralForCausalLM", "mistral", "MistralConfig"),
        ("Qwen2ForCausalLM", "qwen2", "Qwen2Config"),
        ("Qwen3ForCausalLM", "qwen3", "Qwen3Config"),
    ):
        registry.add(architecture, f"kvloom_models.{module}:{architecture}", config=f"kvloom_models.config:{config}")
    for family, module in (("Bert", "bert"), ("Roberta", "roberta"), ("XLMRoberta", "roberta"), ("DistilBert", "distilbert"),
                           ("ModernBert", "modernbert")):
        ours = family.removeprefix("XLM")
        for kind in ("Model", "ForSequenceClassification", "ForMaskedLM"):
            registry.add(family + kind, f"kvloom_models.{module}:{ours}{kind}", config=f"kvloom_models.encoder_config:{ours}Config")
