"""DistilBERT (Sanh et al., 2019): BERT without token types and pooler."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.interfaces.model import BuildContext, ForwardContext
from kvloom.layers import Linear
from kvloom_models.encoder import LabelHead, LayerNames, PostNormEncoder
from kvloom_models.encoder_config import DistilBertConfig


class DistilBertModel(PostNormEncoder):
    """See the module's docstring."""

    base_prefix = "distilbert"
    layers_prefix = "transformer.layer"
    layer_names = LayerNames("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm", "ffn.lin1",
                             "ffn.lin2", "output_layer_norm")


class DistilBertHead(LabelHead):
    """Two linear layers on the first token."""

    def __init__(self, config: DistilBertConfig, build: BuildContext) -> None:
        super().__init__()
        self.pre_classifier = Linear(build, "pre_classifier", config.hidden_size, config.hidden_size, bias=True)
        self.classifier = Linear(build, "classifier", config.hidden_size, config.num_labels, bias=True)

    def forward(self, pooled: Tensor, ctx: ForwardContext) -> Tensor:
        """See `LabelHead`."""
        scores: Tensor = self.classifier(torch.relu(self.pre_classifier(pooled, ctx)), ctx)
        return scores


class DistilBertForSequenceClassification(DistilBertModel):
    """With a label head."""

    head_class = DistilBertHead


class DistilBertForMaskedLM(DistilBertModel):
    """As an embedding model: what predicts masked tokens is left out."""

    ignored = (*DistilBertModel.ignored, "vocab_transform.*", "vocab_layer_norm.*", "vocab_projector.*")
