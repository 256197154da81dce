"""Decoders with a label head: classifiers, cross-encoders, reward models. Mixed into a family's `CausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from kvloom.interfaces.model import BuildContext, ForwardContext, ModuleTarget
from kvloom.layers import Linear
from kvloom_models.config import DecoderConfig
from kvloom_models.decoder import CausalLM


class SequenceClassifier(CausalLM):
    """One linear layer on the last token, as transformers' ``*ForSequenceClassification`` have it."""

    def __init__(self, config: DecoderConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.score = Linear(build, "score", config.hidden_size, config.num_labels)

    @classmethod
    def tasks_of(cls, config: Any) -> tuple[str, ...]:
        """See `Model.tasks_of`: with one label pairs can be scored, too."""
        return ("classify", "score") if config.num_labels == 1 else ("classify",)

    def classify(self, pooled: Tensor, ctx: ForwardContext) -> Tensor:
        """See `Model.classify`: ``[R, H] -> [R, labels]``."""
        scores: Tensor = self.score(pooled, ctx)
        return scores

    def module_map(self) -> Mapping[str, ModuleTarget]:
        """See `Model.module_map`."""
        return {**super().module_map(), "score": ModuleTarget(self.score)}


class RewardModel(CausalLM):
    """Two linear layers with a ReLU between them on every token (Qwen2.5-Math-RM; Yang et al., 2024)."""

    pooling = "ALL"
    tasks = ("reward",)
    default_labels: ClassVar[int] = 1

    def __init__(self, config: DecoderConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        labels = self.labels_of(config)
        self.inner = Linear(build, "score.0", config.hidden_size, config.hidden_size, bias=True)
        self.outer = Linear(build, "score.2", config.hidden_size, labels, bias=True)

    @classmethod
    def labels_of(cls, config: DecoderConfig) -> int:
        """Checkpoints of this architecture do not count their labels."""
        return cls.default_labels

    def classify(self, pooled: Tensor, ctx: ForwardContext) -> Tensor:
        """See `Model.classify`: ``[T, H] -> [T, labels]``."""
        scores: Tensor = self.outer(functional.relu(self.inner(pooled, ctx)), ctx)
        return scores

    def module_map(self) -> Mapping[str, ModuleTarget]:
        """See `Model.module_map`."""
        return {**super().module_map(), "score.0": ModuleTarget(self.inner), "score.2": ModuleTarget(self.outer)}
