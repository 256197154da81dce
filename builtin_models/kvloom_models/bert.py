"""BERT (Devlin et al., 2018): what MiniLM, E5, BGE, GTE and most cross-encoders are."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.interfaces.model import BuildContext, ForwardContext, ModelInputs
from kvloom.layers import Embedding, Linear
from kvloom_models.encoder import LabelHead, LayerNames, PostNormEncoder
from kvloom_models.encoder_config import BertConfig

BERT_LAYER = LayerNames(
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "attention.output.LayerNorm",
    "intermediate.dense", "output.dense", "output.LayerNorm")


class BertModel(PostNormEncoder):
    """Hidden states of the last layer. The dense layer that checkpoints call the pooler is not part of an embedding."""

    base_prefix = "bert"
    layers_prefix = "encoder.layer"
    layer_names = BERT_LAYER
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({"gamma": "weight", "beta": "bias"})
    ignored = (*PostNormEncoder.ignored, "pooler.*")

    def __init__(self, config: BertConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.extra_inputs = {"token_type_ids": config.type_vocab_size}
        self.types = Embedding(build, "embeddings.token_type_embeddings", config.type_vocab_size, config.hidden_size)

    def embed(self, inputs: ModelInputs, ctx: ForwardContext) -> Tensor:
        """See `Encoder.embed`."""
        words, types = self.words(inputs.token_ids, ctx), self.types(inputs.extras["token_type_ids"], ctx)
        x: Tensor = self.norm(words + types + self.positions(self.places(inputs), ctx))
        return x


class BertHead(LabelHead):
    """The pooler and one linear layer."""

    def __init__(self, config: BertConfig, build: BuildContext) -> None:
        super().__init__()
        self.pooler = Linear(build, "pooler.dense", config.hidden_size, config.hidden_size, bias=True)
        self.classifier = Linear(build, "classifier", config.hidden_size, config.num_labels, bias=True)

    def forward(self, pooled: Tensor, ctx: ForwardContext) -> Tensor:
        """See `LabelHead`."""
        scores: Tensor = self.classifier(torch.tanh(self.pooler(pooled, ctx)), ctx)
        return scores


class BertForSequenceClassification(BertModel):
    """With a label head on the first token."""

    head_class = BertHead
    ignored = PostNormEncoder.ignored


class BertForMaskedLM(BertModel):
    """As an embedding model: what predicts masked tokens is left out."""

    ignored = (*BertModel.ignored, "cls.*")
