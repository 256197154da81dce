"""Registers our model families under their config.json architecture names. Imports no torch."""

from __future__ import annotations

from kvloom import hookimpl
from kvloom.interfaces.registrar import Registrar

KVLOOM_API = {"models": 0}
REWARD_MODELS = ("ForRewardModel", "ForProcessRewardModel")


@hookimpl
def kvloom_register_models(registry: Registrar) -> None:
    """One line an architecture: the model class, and the config.json keys that it may see."""
    for family, module in (("Llama", "llama"), ("Mistral", "mistral"), ("Qwen2", "qwen2"), ("Qwen3", "qwen3")):
        for kind in ("ForCausalLM", "Model", "ForSequenceClassification", *(REWARD_MODELS if family == "Qwen2" else ())):
            registry.add(family + kind, f"kvloom_models.{module}:{family}{kind}", config=f"kvloom_models.config:{family}Config")
    for family, module in (("Bert", "bert"), ("Roberta", "roberta"), ("XLMRoberta", "roberta"), ("DistilBert", "distilbert"),
                           ("ModernBert", "modernbert")):
        ours = family.removeprefix("XLM")
        for kind in ("Model", "ForSequenceClassification", "ForMaskedLM"):
            registry.add(family + kind, f"kvloom_models.{module}:{ours}{kind}", config=f"kvloom_models.encoder_config:{ours}Config")
