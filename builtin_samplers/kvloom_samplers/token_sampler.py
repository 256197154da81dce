"""Greedy rows take the best token; the others one by its probability, from one uniform number and the cumulative distribution."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvloom.interfaces import SampledTokens, Sampler, SamplingRows
from kvloom_samplers.philox import uniforms


class TokenSampler(Sampler):
    """See the module's docstring. Rows whose logits are not finite fail alone."""

    def sample(self, logits: Tensor, rows: SamplingRows) -> SampledTokens:
        """See `Sampler.sample`."""
        best, token_ids = logits.max(dim=-1)  # NaN wins every comparison, so `best` shows it
        failed = {int(i): "its logits are not finite: the model computed NaN or infinity for it"
                  for i in torch.nonzero(~torch.isfinite(best)).flatten().tolist()}
        drawn = np.flatnonzero(rows.temperatures > 0)
        if len(drawn):
            index = torch.from_numpy(drawn).to(logits.device)
            token_ids[index] = _draw(logits[index], best[index], rows, drawn)
        return SampledTokens(token_ids, failed=failed)


def _draw(logits: Tensor, best: Tensor, rows: SamplingRows, drawn: np.ndarray) -> Tensor:
    """Inverse of the cumulative distribution, ``[r, V] -> [r]``. Sums are taken in float64: a vocabulary is long."""
    weights = logits.sub_(best[:, None]).exp_()
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    numbers = torch.from_numpy(uniforms(rows.seeds[drawn], rows.sample_indices[drawn], rows.positions[drawn])).to(logits.device)
    total = cumulative[:, -1:]
    targets = torch.minimum(numbers[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))  # below the total, rounded too
    # The first token whose cumulative weight exceeds the target: a token of weight 0 never is.
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]
