"""RoBERTa (Liu et al., 2019) and XLM-RoBERTa (Conneau et al., 2019): BERT with other positions and another label head."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.interfaces.model import BuildContext, ForwardContext, ModelInputs
from kvloom.layers import Linear
from kvloom_models.bert import BertModel
from kvloom_models.encoder import LabelHead
from kvloom_models.encoder_config import RobertaConfig


class RobertaModel(BertModel):
    """See the module's docstring."""

    base_prefix = "roberta"

    def __init__(self, config: RobertaConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self._pad = config.pad_token_id

    def places(self, inputs: ModelInputs) -> Tensor:
        """Counted from ``pad_token_id + 1`` on; padding tokens among the prompt's have none and are not counted."""
        counted = (inputs.token_ids != self._pad).long()  # [T]
        before = counted.cumsum(0) - counted
        starts = torch.arange(len(counted), device=counted.device) - inputs.positions[0]  # each token's sequence begins there
        return (before - before[starts] + 1) * counted + self._pad


class RobertaHead(LabelHead):
    """Two linear layers on the first token."""

    def __init__(self, config: RobertaConfig, build: BuildContext) -> None:
        super().__init__()
        self.dense = Linear(build, "classifier.dense", config.hidden_size, config.hidden_size, bias=True)
        self.out_proj = Linear(build, "classifier.out_proj", config.hidden_size, config.num_labels, bias=True)

    def forward(self, pooled: Tensor, ctx: ForwardContext) -> Tensor:
        """See `LabelHead`."""
        scores: Tensor = self.out_proj(torch.tanh(self.dense(pooled, ctx)), ctx)
        return scores


class RobertaForSequenceClassification(RobertaModel):
    """With a label head."""

    head_class = RobertaHead


class RobertaForMaskedLM(RobertaModel):
    """As an embedding model: what predicts masked tokens is left out."""

    ignored = (*RobertaModel.ignored, "lm_head.*")
