"""Choosing from long vocabularies without sorting them, and log-probabilities; each with its plain-torch reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvloom_kernels.call import is_native, pointer
from kvloom_kernels.plan import unrecorded


def divide_reference(logits: Tensor, by: Tensor) -> Tensor:
    """``logits [r, V]`` float32, each row divided in place by a number of ``by [r]`` float32."""
    return logits.div_(by[:, None])


def divide(logits: Tensor, by: Tensor) -> Tensor:
    """See `divide_reference`. Not by torch, whose threads would then wait busily while the next kernel runs."""
    if not (logits.dtype is torch.float32 and logits.is_contiguous() and is_native(logits, by)):
        return divide_reference(logits, by)
    by = by.contiguous()
    unrecorded("kvloom_divide")(pointer(logits), pointer(by), logits.shape[0], logits.shape[1], torch.get_num_threads())
    return logits


def top_p_reference(logits: Tensor, p: Tensor) -> Tensor:
    """Minus infinity for what is not among the best tokens whose probabilities add up to `p`; ties with the last one stay.

    A row with a NaN stays as it is: whoever samples must see that it is broken.

    Args:
        logits: ``[r, V]`` float32, changed in place.
        p: ``[r]`` float32 in (0, 1].
    """
    best = logits.sort(dim=-1, descending=True).values
    mass = best.double().softmax(-1).cumsum(-1)
    before = mass.roll(1, dims=-1)
    before[:, 0] = 0
    # A NaN sorts first and makes the mass NaN: it is the threshold then, and nothing is smaller than it.
    last = (before < p.double()[:, None]).sum(-1, keepdim=True).clamp_(min=1) - 1  # kept while the mass before it is too little
    return logits.masked_fill_(logits < best.gather(1, last), -torch.inf)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """See `top_p_reference`. One pass over each row finds the threshold's first digits, two more over few elements the rest."""
    if not (logits.dtype is torch.float32 and logits.is_contiguous() and is_native(logits, p)):
        for part, own in _parts(logits, p):
            top_p_reference(part, own)
        return logits
    p = p.contiguous()
    unrecorded("kvloom_top_p")(pointer(logits), pointer(p), logits.shape[0], logits.shape[1], torch.get_num_threads())
    return logits


DEVICE_ROWS = 64
"""Rows that torch sorts or sums up at one time, which takes many times their memory."""


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all of them, `DEVICE_ROWS` at a time."""
    return zip(*(torch.split(t, DEVICE_ROWS) for t in tensors), strict=True)


def best_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``[r, V]`` float32 -> value and index of the first of each row's largest; a row with NaN has the value NaN."""
    value, index = logits.max(dim=-1)
    return value, index


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """See `best_reference`; the index of a row with NaN means nothing."""
    if not (logits.dtype is torch.float32 and logits.is_contiguous() and is_native(logits)):
        return best_reference(logits)
    value, index = torch.empty(logits.shape[0]), torch.empty(logits.shape[0], dtype=torch.int64)
    unrecorded("kvloom_best")(pointer(logits), pointer(value), pointer(index), *logits.shape, torch.get_num_threads())
    return value, index


def draw_reference(logits: Tensor, best: Tensor, uniform: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: the first token whose cumulative weight exceeds ``uniform`` of the total.

    Args:
        logits: ``[r, V]`` float32.
        best: ``[r]`` the largest of each row.
        uniform: ``[r]`` float64 in (0, 1).

    Returns:
        ``[r]`` int64.
    """
    cumulative = (logits - best[:, None]).exp_().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    targets = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))  # below the total, rounded too
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def draw(logits: Tensor, best: Tensor, uniform: Tensor) -> Tensor:
    """See `draw_reference`."""
    if not (logits.dtype is torch.float32 and logits.is_contiguous() and is_native(logits)):
        return torch.cat([draw_reference(*part) for part in _parts(logits, best, uniform)])
    best, uniform = best.contiguous(), uniform.contiguous()
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    unrecorded("kvloom_draw")(pointer(logits), pointer(best), pointer(uniform), pointer(out), logits.shape[0], logits.shape[1],
                          torch.get_num_threads())
    return out


LIST_LIMIT = 256
"""The most best tokens that the kernel's sorted list keeps; above, torch sorts the vocabulary."""


class TokenLogprobs(NamedTuple):
    """One row of a batch a row; column 0 is the chosen token, columns 1 to k are the k best ones, best first."""

    token_ids: Tensor
    """``[r, 1 + k]`` int64."""
    logprobs: Tensor
    """``[r, 1 + k]`` float32: the logit less the logarithm of the sum of all exponentials."""
    ranks: Tensor
    """``[r, 1 + k]`` int64. The chosen token's is 1 + the number of tokens with a strictly larger logit, so tokens that tie share a
    rank; that of the k best is their place 1 to k, where the lower token id goes first among ties. A chosen token that ties with
    others may therefore have a smaller rank than place."""


def token_logprobs_reference(logits: Tensor, token_ids: Tensor, k: int) -> TokenLogprobs:
    """Log-probabilities and ranks of the chosen tokens and of the `k` best ones of each row.

    A logit of minus infinity has the log-probability minus infinity. A row with NaN or plus infinity, or with nothing but minus
    infinity, has no probabilities: all its logprobs are NaN, and which tokens are its best is not defined; they are k of its own.

    Args:
        logits: ``[r, V]`` of any floating dtype, not changed.
        token_ids: ``[r]`` int64 in [0, V), the chosen tokens.
        k: from 0, only the chosen token, to V.

    Raises:
        ValueError: `token_ids` or `k` out of range, or shapes or dtype that do not fit.
    """
    _check(logits, token_ids, k)
    chosen = token_ids[:, None]
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k] if k else token_ids.new_empty((len(token_ids), 0))
    ids = torch.cat((chosen, best), dim=1)
    larger = (logits > logits.gather(1, chosen)).sum(-1, keepdim=True)
    places = torch.arange(1, k + 1, device=logits.device).expand(len(token_ids), k)
    return TokenLogprobs(ids, logits.double().log_softmax(-1).gather(1, ids).float(), torch.cat((larger + 1, places), dim=1))


def token_logprobs_torch(logits: Tensor, token_ids: Tensor, k: int) -> TokenLogprobs:
    """See `token_logprobs_reference`, of any device, without waiting for it: ids out of range are not found, and count as the nearest.

    Logits and places are sorted as one number, so that ties go to the lower token id whatever the device's order is.
    """
    _check_shapes(logits, token_ids, k)
    chosen = token_ids.clamp(0, logits.shape[1] - 1)[:, None]
    wide = logits.float()
    own = wide.gather(1, chosen)
    bits = (wide + 0.0).view(torch.int32)  # 0.0 has one sign
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) | (2**32 - 1 - torch.arange(logits.shape[1], device=logits.device))
    best = 2**32 - 1 - (keys.topk(k, dim=-1).values & (2**32 - 1))
    ids = torch.cat((chosen, best), dim=1)
    places = torch.arange(1, k + 1, device=logits.device).expand(len(token_ids), k)
    ranks = torch.cat(((wide > own).sum(-1, keepdim=True) + 1, places), dim=1)
    return TokenLogprobs(ids, wide.log_softmax(-1).gather(1, ids), ranks)


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> TokenLogprobs:
    """See `token_logprobs_reference`. Two passes over each row, without sorting it, for up to `LIST_LIMIT` best tokens."""
    if logits.device.type != "cpu":
        parts = [token_logprobs_torch(part, ids, k) for part, ids in _parts(logits, token_ids)]
        return TokenLogprobs(*map(torch.cat, zip(*parts, strict=True)))
    if not (k <= LIST_LIMIT and token_ids.device == logits.device and is_native(logits) and logits.ndim == 2 and logits.stride(1) == 1):
        return token_logprobs_reference(logits, token_ids, k)
    _check(logits, token_ids, k)
    (rows, size), token_ids = logits.shape, token_ids.contiguous()
    out = TokenLogprobs(torch.empty((rows, 1 + k), dtype=torch.int64), torch.empty((rows, 1 + k)),
                        torch.empty((rows, 1 + k), dtype=torch.int64))
    unrecorded("kvloom_token_logprobs")(pointer(logits), logits.stride(0), pointer(token_ids), k, *map(pointer, out), rows, size,
                                    logits.dtype is torch.bfloat16, torch.get_num_threads())
    return out


def _check(logits: Tensor, token_ids: Tensor, k: int) -> None:
    """Raises ValueError for what would make the kernel read or write out of bounds."""
    _check_shapes(logits, token_ids, k)
    if ((token_ids < 0) | (token_ids >= logits.shape[1])).any():
        raise ValueError(f"token_ids must be in [0, {logits.shape[1]})")


def _check_shapes(logits: Tensor, token_ids: Tensor, k: int) -> None:
    if logits.ndim != 2 or token_ids.shape != logits.shape[:1] or token_ids.dtype is not torch.int64:
        raise ValueError(f"logits [r, V] and int64 token_ids [r] are needed, not {list(logits.shape)} and {token_ids.dtype} "
                         f"{list(token_ids.shape)}")
    size = logits.shape[1]
    if not 0 <= k <= size:
        raise ValueError(f"k must be in 0 to {size}, the size of the vocabulary, not {k}")
