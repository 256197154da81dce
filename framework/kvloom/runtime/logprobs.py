"""Log-probabilities as callers get them: of raw logits, before any processor, the chosen token first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from torch import Tensor

from kvloom.interfaces.step import TokenLogprob
from kvloom_kernels.sampling import token_logprobs

Candidates = tuple[TokenLogprob, ...]
CHUNK_ROWS = 64
"""Rows of prompt logits that exist at one time; the memory plan counts them."""


def candidates(logits: Tensor, token_ids: Tensor, wanted: Sequence[int]) -> list[Candidates]:
    """One tuple a row: the chosen token, then the best others.

    Args:
        logits: ``[r, V]`` raw, of any float dtype; not changed.
        token_ids: ``[r]`` int64, the chosen ones.
        wanted: how many of the best each row wants, at most V.
    """
    by_number: dict[int, list[int]] = defaultdict(list)
    for row, k in enumerate(wanted):
        by_number[k].append(row)
    if len(by_number) == 1:
        return _equal_numbers(logits, token_ids, wanted[0])
    out: list[Candidates] = [()] * len(wanted)
    for k, rows in by_number.items():
        for row, found in zip(rows, _equal_numbers(logits[rows], token_ids[rows], k), strict=True):
            out[row] = found
    return out


def _equal_numbers(logits: Tensor, token_ids: Tensor, k: int) -> list[Candidates]:
    found = token_logprobs(logits, token_ids, k)
    rows = zip(found.token_ids.tolist(), found.logprobs.tolist(), found.ranks.tolist(), strict=True)
    return [_without_repeat(tuple(map(TokenLogprob._make, zip(*row, strict=True)))) for row in rows]


def _without_repeat(row: Candidates) -> Candidates:
    """The chosen token is among the best more often than not: it is named once."""
    chosen = row[0].token_id
    return (row[0], *[c for c in row[1:] if c.token_id != chosen])


def prompt_candidates(hidden: Tensor, token_ids: Tensor, k: int, logits_of: Callable[[Tensor], Tensor]) -> list[Candidates]:
    """The same for prompt tokens, a few rows of logits at a time.

    Args:
        hidden: ``[r, H]`` of the positions before each token.
        token_ids: ``[r]`` int64, the prompt's next tokens.
        k: how many of the best each wants.
        logits_of: ``[c, H] -> [c, V]``.
    """
    out: list[Candidates] = []
    for start in range(0, len(hidden), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        out += candidates(logits_of(hidden[part]), token_ids[part], [k] * len(token_ids[part]))
    return out

