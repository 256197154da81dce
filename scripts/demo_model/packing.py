"""Documents packed into rows for training. Each document sees itself only, from position 0: as when the model is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo_model.chat import ASSISTANT, END, SYSTEM, USER

ROW_TOKENS = (256, 512)
"""Short rows for most documents, long ones for those that need them: attention over rows of 512 took 42 % of a step."""
BATCH_TOKENS = 2048
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens, all tensors int64 `[B, S]` but `mask`.

    `targets` is the token to predict at each place, or `IGNORED`; `mask` is float32 `[B, 1, S, S]`, added to attention scores.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, targets) of each document. What a user or the system says is no target: made-up words there cannot be learned."""
    special = {name: tokenizer.token_to_id(name) for name in (USER, ASSISTANT, SYSTEM, END)}
    out = []
    for encoding in tokenizer.encode_batch(list(documents)):
        tokens = np.array(encoding.ids, dtype=np.int64)
        if len(tokens) > ROW_TOKENS[-1]:
            raise SystemExit(f"a document has {len(tokens)} tokens, a row {ROW_TOKENS[-1]}: {documents[len(out)][:80]}")
        targets = np.full_like(tokens, IGNORED)
        learned = tokens[1] not in (special[USER], special[SYSTEM])  # a story
        for i in range(len(tokens) - 1):
            if tokens[i] == special[ASSISTANT]:
                learned = True
            if learned:
                targets[i] = tokens[i + 1]
            if tokens[i + 1] == special[END]:
                learned = False
        out.append((tokens, targets))
    return out


def pack(lengths: Sequence[int], order: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Rows of document numbers: each row is filled in order until the next document does not fit."""
    rows: list[list[int]] = []
    room = 0
    for number in order:
        if lengths[number] > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(number)
        room -= lengths[number]
    return rows


def batches(encoded: Sequence[tuple[np.ndarray, np.ndarray]], seed: int) -> Iterator[Batch]:
    """Endless: every pass over the documents in another order."""
    lengths = [len(tokens) for tokens, _ in encoded]
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(encoded)).tolist()
        found: list[tuple[int, list[list[int]]]] = []
        for shorter, row_tokens in zip((0, *ROW_TOKENS), ROW_TOKENS, strict=False):
            rows = pack(lengths, [number for number in order if shorter < lengths[number] <= row_tokens], row_tokens)
            count = BATCH_TOKENS // row_tokens
            found += [(row_tokens, rows[start:start + count]) for start in range(0, len(rows) - count + 1, count)]
        for which in generator.permutation(len(found)).tolist():
            yield _batch(encoded, *found[which])


def _batch(encoded: Sequence[tuple[np.ndarray, np.ndarray]], row_tokens: int, rows: Sequence[Sequence[int]]) -> Batch:
    tokens, positions, targets, owner = (np.full((len(rows), row_tokens), fill, dtype=np.int64) for fill in (0, 0, IGNORED, -1))
    for r, row in enumerate(rows):
        at = 0
        for number in row:
            end = at + len(encoded[number][0])
            tokens[r, at:end], targets[r, at:end] = encoded[number]
            positions[r, at:end] = np.arange(end - at)
            owner[r, at:end] = number
            at = end
    seen = torch.from_numpy(owner[:, :, None] == owner[:, None, :]) & torch.ones(row_tokens, row_tokens, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(targets), mask[:, None])
