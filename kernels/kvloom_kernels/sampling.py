"""Choosing from long vocabularies without sorting them; each with its plain-torch reference."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom_kernels.call import is_native, pointer
from kvloom_kernels.native import library


def top_p_reference(logits: Tensor, p: Tensor) -> Tensor:
    """Minus infinity for what is not among the best tokens whose probabilities add up to `p`; ties with the last one stay.

    Args:
        logits: ``[r, V]`` float32, changed in place.
        p: ``[r]`` float32 in (0, 1].
    """
    best = logits.sort(dim=-1, descending=True).values
    mass = best.double().softmax(-1).cumsum(-1)
    before = mass.roll(1, dims=-1)
    before[:, 0] = 0
    last = (before < p.double()[:, None]).sum(-1, keepdim=True).clamp_(min=1) - 1  # kept while the mass before it is too little
    return logits.masked_fill_(logits < best.gather(1, last), -torch.inf)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """See `top_p_reference`. One pass over each row finds the threshold's first digits, two more over few elements the rest."""
    if not (logits.dtype is torch.float32 and logits.is_contiguous() and is_native(logits, p)):
        return top_p_reference(logits, p)
    p = p.contiguous()
    library().kvloom_top_p(pointer(logits), pointer(p), logits.shape[0], logits.shape[1], torch.get_num_threads())
    return logits


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
        return draw_reference(logits, best, uniform)
    best, uniform = best.contiguous(), uniform.contiguous()
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    library().kvloom_draw(pointer(logits), pointer(best), pointer(uniform), pointer(out), logits.shape[0], logits.shape[1],
                          torch.get_num_threads())
    return out
