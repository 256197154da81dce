"""Tokens that a mask does not allow have no probability; nothing else changes."""

from __future__ import annotations

import pytest
import torch

from kvloom_kernels.bitmask import apply_bitmask, apply_bitmask_reference


def random_masks(count: int, size: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``[count, size]`` bool, and the same as masks whose spare bits are random."""
    generator = torch.Generator().manual_seed(size + count)
    words = -(-size // 32)
    bits = torch.rand((count, words * 32), generator=generator) < share
    weights = 2 ** torch.arange(32, dtype=torch.int64)
    packed = (bits.view(count, words, 32) * weights).sum(-1)
    return bits[:, :size], (packed - (packed >= 2**31) * 2**32).to(torch.int32)


@pytest.mark.parametrize("apply", [apply_bitmask, apply_bitmask_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "size"), [([0], 1), ([2, 0], 31), ([1], 32), ([3, 1], 33), ([0, 1, 2, 3], 5000), ([], 40)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.9, 1.0])
def test_a_mask_forbids_what_it_has_no_bit_for(apply, dtype: torch.dtype, rows: list[int], size: int, share: float) -> None:
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = logits.clone()
    allowed, masks = random_masks(len(rows), size, share)
    apply(logits, masks, torch.tensor(rows, dtype=torch.int64))
    expected = before.clone()
    for row, keep in zip(rows, allowed, strict=True):
        expected[row, ~keep] = -torch.inf
    assert torch.equal(logits, expected)


def test_rows_of_a_larger_tensor_are_masked_in_place() -> None:
    whole = torch.zeros(3, 100)
    apply_bitmask(whole[:, :40], torch.zeros(1, 2, dtype=torch.int32), torch.tensor([1]))
    assert torch.isneginf(whole).nonzero().tolist() == [[1, i] for i in range(40)]


@pytest.mark.parametrize("apply", [apply_bitmask, apply_bitmask_reference])
@pytest.mark.parametrize(("masks", "rows"), [
    (torch.zeros(1, 3, dtype=torch.int32), torch.tensor([0])), (torch.zeros(2, 2, dtype=torch.int32), torch.tensor([0])), (torch.zeros(1, 2), torch.tensor([0])),
    (torch.zeros(1, 2, dtype=torch.int32), torch.tensor([4])), (torch.zeros(1, 2, dtype=torch.int32), torch.tensor([-1])), (torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0], dtype=torch.int32)),
])
def test_what_does_not_fit_is_refused_before_anything_changes(apply, masks: torch.Tensor, rows: torch.Tensor) -> None:
    logits = torch.zeros(4, 40)
    with pytest.raises(ValueError, match="needed|rows must be"):
        apply(logits, masks, rows)
    assert not logits.any()
