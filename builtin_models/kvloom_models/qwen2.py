"""Qwen2 and Qwen2.5 (Qwen Team, 2024): Llama with biases on query, key and value, and maybe windows in its upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvloom_models.decoder import CausalLM
from kvloom_models.labels import RewardModel, SequenceClassifier
from kvloom_models.llama import LlamaLayer

STEP_TAG_ID = 151651
"""``<extra_0>`` of Qwen2.5-Math-PRM's tokenizer."""


class Qwen2ForCausalLM(CausalLM):
    """What differs from Llama is in `Qwen2Config`."""

    layer_class = LlamaLayer


class Qwen2Model(Qwen2ForCausalLM):
    """The same without an output head: for embeddings."""

    tasks = ("embed",)


class Qwen2ForSequenceClassification(SequenceClassifier, Qwen2ForCausalLM):
    """With a label head on the last token."""


class Qwen2ForRewardModel(RewardModel, Qwen2ForCausalLM):
    """A reward for every token."""


class Qwen2ForProcessRewardModel(Qwen2ForRewardModel):
    """Two labels, bad and good, for every step of reasoning, each of which a special token ends."""

    pooling = "STEP"
    pooling_options: Mapping[str, Any] = MappingProxyType({"softmax": True, "step_tag_id": STEP_TAG_ID})
    default_labels = 2
