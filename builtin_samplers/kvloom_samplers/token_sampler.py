"""Greedy rows take the best token; the others one by its probability, from one uniform number and the cumulative distribution."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvloom.interfaces import SampledTokens, Sampler, SamplingRows
from kvloom_kernels.sampling import best, draw
from kvloom_kernels.transfer import to_device
from kvloom_samplers.philox import uniforms


class TokenSampler(Sampler):
    """See the module's docstring. Rows whose logits are not finite fail alone."""

    def sample(self, logits: Tensor, rows: SamplingRows) -> SampledTokens:
        """See `Sampler.sample`."""
        largest, token_ids = best(logits)
        finite = largest.abs() < torch.inf  # half of what isfinite does, which shows where one row is decoded
        drawn = np.flatnonzero(rows.temperatures > 0)
        if len(drawn):
            index = to_device(drawn, logits.device)
            numbers = uniforms(rows.seeds[drawn], rows.sample_indices[drawn], rows.positions[drawn])
            asking = logits if len(drawn) == len(logits) else logits[index]
            token_ids[index] = draw(asking, largest[index], to_device(numbers, logits.device))
        return SampledTokens(token_ids, finite=finite)
