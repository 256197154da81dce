"""STEP: hidden states of the tokens that end a step of reasoning, which a process reward model scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import RequestValidationError
from kvloom.interfaces import Pooler
from kvloom.params import PoolingParams
from kvloom_kernels.transfer import to_device


class Steps(NamedTuple):
    """``ends``: positions of the tag, all where there is none; ``rows``: of those so far, chunk by chunk."""

    ends: np.ndarray[Any, np.dtype[np.int64]]
    rows: tuple[Tensor, ...]


class StepPooler(Pooler):
    """Rows of the tokens `PoolingParams.step_tag_id`."""

    gives_rows = True

    def start(self, params: PoolingParams, token_ids: Sequence[int]) -> Steps:
        """See `Pooler.start`. Raises `RequestValidationError` for a prompt without the tag."""
        ids, tag = np.array(token_ids), params.step_tag_id
        ends = np.arange(len(ids)) if tag is None else np.flatnonzero(ids == tag)
        if not len(ends):
            raise RequestValidationError(f"the prompt has no token {tag}, which ends a step (step_tag_id)", "step_tag_id", tag)
        return Steps(ends, ())

    def update(self, state: Steps, hidden: Tensor, first_position: int) -> Steps:
        """See `Pooler.update`."""
        here = state.ends[(state.ends >= first_position) & (state.ends < first_position + len(hidden))]
        return Steps(state.ends, (*state.rows, hidden[to_device(here - first_position, hidden.device)]))

    def finish(self, state: Steps) -> Tensor:
        """See `Pooler.finish`: ``[steps, H]``."""
        return torch.cat(state.rows)
