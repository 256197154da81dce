"""From pooling requests that ended to what callers get."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvloom.errors import InternalError, KvloomError
from kvloom.interfaces.step import Pooled
from kvloom.interfaces.tokenizer import Tokenizer
from kvloom.outputs import RequestMetrics
from kvloom.pooling_outputs import PooledData, PoolingOutput, PoolingRequestOutput

if TYPE_CHECKING:
    from kvloom.live_request import LiveRequest


def pooling_output(live: LiveRequest, tokenizer: Tokenizer | None, error: KvloomError | None) -> PoolingRequestOutput[Any]:
    """The output of a request that is over; with an error it has no `outputs`."""
    request = live.sequences[0].request
    if error is None and request.pooled is None:
        raise InternalError(f"request {live.request_id} ended without a result")
    outputs = None if error is not None or request.pooled is None else PoolingOutput(tensor_of(request.pooled))
    return PoolingRequestOutput(live.request_id, outputs, list(request.spec.prompt_token_ids), True, request.metrics.num_cached_tokens,
                                error, request.metrics)


def pooling_refusal(live: LiveRequest, error: KvloomError) -> PoolingRequestOutput[Any]:
    """The output of a request that was never computed."""
    now_s = time.monotonic()
    token_ids = list(live.sequences[0].request.spec.prompt_token_ids) if live.sequences else []
    return PoolingRequestOutput(live.request_id, None, token_ids, True, 0, error, RequestMetrics(now_s, finished_time=now_s))


def tensor_of(pooled: Pooled) -> PooledData:
    """A float32 tensor of its own."""
    import torch

    return torch.from_numpy(np.frombuffer(pooled.data, "<f4").astype(np.float32).reshape(pooled.shape))
