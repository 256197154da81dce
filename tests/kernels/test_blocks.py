"""Copies of whole blocks, in one call and with torch, against one at a time."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom_kernels.blocks import copy_blocks, copy_blocks_reference, touch

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8)


def tensors(dtype: torch.dtype, *, together: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(7, *shape, generator=generator).to(dtype) for shape in ((3,), (2, 5), (1, 4, 2))]
    return made if together else [torch.stack((t, t), 1)[:, 0] for t in made]


@pytest.mark.parametrize("together", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@given(pairs=PAIRS)
def test_copies_are_made_as_one_after_the_other(dtype: torch.dtype, together: bool, pairs: list[tuple[int, int]]) -> None:
    expected, found = tensors(dtype), tensors(dtype, together=together)
    copy_blocks_reference(expected, pairs)
    copy_blocks(found, pairs)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("pair", [(0, 7), (-1, 0), (7, 1)])
def test_blocks_that_are_not_there_are_refused(pair: tuple[int, int]) -> None:
    before, found = tensors(torch.float32), tensors(torch.float32)
    with pytest.raises(IndexError, match=r"\[0, 7\)"):
        copy_blocks(found, [(1, 2), pair])
    assert all(map(torch.equal, found, before))


def test_touch_writes_zeros_to_each_page_of_each_tensor() -> None:
    found = [torch.ones(n, dtype=torch.uint8) for n in (1, 5 * mmap.PAGESIZE, 3 * mmap.PAGESIZE + 1)]
    touch(found)
    for tensor in found:
        expected = torch.ones_like(tensor)
        expected[::mmap.PAGESIZE] = 0
        assert torch.equal(tensor, expected)
