"""Log-probabilities as callers get them: of raw logits, before any processor, the chosen token first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kvloom.interfaces.step import TokenLogprob
from kvloom.runtime.outbox import Later, Outbox
from kvloom_kernels.sampling import token_logprobs
from kvloom_kernels.transfer import to_device

Candidates = tuple[TokenLogprob, ...]
CHUNK_ROWS = 64
"""Rows of prompt logits that exist at one time; the memory plan counts them."""


class Found(NamedTuple):
    """Candidates of some rows, on their way to the host: ids, log-probabilities and ranks, see `TokenLogprobs`."""

    rows: Sequence[int]
    numbers: Later


def candidates(logits: Tensor, token_ids: Tensor, wanted: Sequence[int], outbox: Outbox) -> list[Found]:
    """The chosen token and the best others of each row.

    Args:
        logits: ``[r, V]`` raw, of any float dtype; not changed.
        token_ids: ``[r]`` int64, the chosen ones.
        wanted: how many of the best each row wants, at most V.
        outbox: takes them to the host; see `arrived`.
    """
    by_number: dict[int, list[int]] = defaultdict(list)
    for row, k in enumerate(wanted):
        by_number[k].append(row)
    found = []
    for k, rows in by_number.items():
        if len(by_number) == 1:
            numbers = token_logprobs(logits, token_ids, k)
        else:
            index = to_device(np.array(rows), logits.device)
            numbers = token_logprobs(logits[index], token_ids[index], k)
        found.append(Found(rows, outbox.add(*numbers)))
    return found


def arrived(found: Sequence[Found]) -> dict[int, Candidates]:
    """On the host, by row: the chosen token first."""
    out: dict[int, Candidates] = {}
    for rows, numbers in found:
        columns = zip(*(numbers_of_one.tolist() for numbers_of_one in numbers()), strict=True)
        for row, values in zip(rows, columns, strict=True):
            out[row] = _without_repeat(tuple(map(TokenLogprob._make, zip(*values, strict=True))))
    return out


def _without_repeat(row: Candidates) -> Candidates:
    """The chosen token is among the best more often than not: it is named once."""
    chosen = row[0].token_id
    return (row[0], *[c for c in row[1:] if c.token_id != chosen])


def prompt_candidates(hidden: Tensor, token_ids: Tensor, k: int, logits_of: Callable[[Tensor], Tensor],
                      outbox: Outbox) -> list[list[Found]]:
    """The same for prompt tokens, a few rows of logits at a time; see `arrived` for each part.

    Args:
        hidden: ``[r, H]`` of the positions before each token.
        token_ids: ``[r]`` int64, the prompt's next tokens.
        k: how many of the best each wants.
        logits_of: ``[c, H] -> [c, V]``.
    """
    parts = [slice(start, start + CHUNK_ROWS) for start in range(0, len(hidden), CHUNK_ROWS)]
    return [candidates(logits_of(hidden[part]), token_ids[part], [k] * len(token_ids[part]), outbox) for part in parts]
