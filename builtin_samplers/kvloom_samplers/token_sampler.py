"""Greedy rows take the best token; the others one by its probability, from one uniform number and the cumulative distribution."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvloom.interfaces import SampledTokens, Sampler, SamplingRows
from kvloom_kernels.sampling import best, draw
from kvloom_samplers.philox import uniforms


class TokenSampler(Sampler):
    """See the module's docstring. Rows whose logits are not finite fail alone."""

    def sample(self, logits: Tensor, rows: SamplingRows) -> SampledTokens:
        """See `Sampler.sample`."""
        largest, token_ids = best(logits)
        failed = {int(i): "its logits are not finite: the model computed NaN or infinity for it"
                  for i in torch.nonzero(~torch.isfinite(largest)).flatten().tolist()}
        drawn = np.flatnonzero(rows.temperatures > 0)
        if len(drawn):
            index = torch.from_numpy(drawn).to(logits.device)
            numbers = uniforms(rows.seeds[drawn], rows.sample_indices[drawn], rows.positions[drawn])
            asking = logits if len(drawn) == len(logits) else logits[index]
            token_ids[index] = draw(asking, largest[index], torch.from_numpy(numbers).to(logits.device))
        return SampledTokens(token_ids, failed=failed)
