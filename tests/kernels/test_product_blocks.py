"""Products that the kernel does in pieces: rows block by block, as those of long prompts are, and results that no cache holds.

A block is 512 KiB of rows, so a few long ones are several: with 4096 elements one has from 24 to 64 rows, whatever the CPU and dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_kernel_threads import threads
from test_odd_shapes import assert_close, part_of_wider, random

from kvloom_kernels.activation import Finish
from kvloom_kernels.linear import WeightShape, pack, panel_features, product, product_reference
from kvloom_kernels.native import problem

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
EACH_SIZE = pytest.mark.parametrize(("rows", "inner"), [*((rows, inner) for rows in (31, 61, 65, 131) for inner in (4095, 4096)), (70, 14016)])
"""float32: 2, 3, 3 and 5 or 6 blocks; bfloat16 that is multiplied as such: 1 or 2, and 3; the last one is odd. Of the longest rows half a
MiB is less than the kernel multiplies at once."""
FEATURES = 137
"""An odd number of pairs of panels, so the last pair of a block and the first of the next one may be taken together."""


def by_any_number_of_threads(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What one thread gives, which two and three give to the bit."""
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(call())
    assert all(torch.equal(results[0], other) for other in results[1:])
    return results[0]


@EACH_DTYPE
@EACH_SIZE
def test_rows_of_several_blocks(dtype: torch.dtype, rows: int, inner: int) -> None:
    weight, bias = random(FEATURES, inner, dtype=dtype, seed=1), random(FEATURES, dtype=dtype, seed=2)
    packed, shape, x = pack(weight.clone()), WeightShape(FEATURES, inner), part_of_wider(rows, inner, dtype)
    for added, widened in ((None, False), (bias, False), (None, True)):
        found = by_any_number_of_threads(lambda added=added, widened=widened: product(x, packed, shape, added, widened=widened))
        assert_close(found, product_reference(x, weight, added, widened=widened), inner)
    for row in {0, 23, 24, 29, 30, 59, 60, 63, 64, rows - 1} & set(range(rows)):
        assert torch.equal(product(x[row:row + 1], packed, shape, widened=True)[0], found[row]), row


@EACH_DTYPE
@EACH_SIZE
def test_gated_rows_of_several_blocks(dtype: torch.dtype, rows: int, inner: int) -> None:
    half = 80
    assert half % panel_features() == 0, "or else the activation is another kernel's"
    weight, bias = random(2 * half, inner, dtype=dtype, seed=1) / inner**0.5, random(2 * half, dtype=dtype, seed=2)
    packed, shape, x = pack(weight.clone()), WeightShape(2 * half, inner), part_of_wider(rows, inner, dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2**-5, "atol": 2**-6}
    for added in (None, bias):
        found = by_any_number_of_threads(lambda added=added: product(x, packed, shape, added, Finish.SILU))
        torch.testing.assert_close(found, product_reference(x, weight, added, Finish.SILU), **tolerance)


@pytest.mark.parametrize("features", [4096, 4100])
def test_results_that_no_cache_holds(features: int) -> None:
    """Where tiles multiply, more than 8 MiB are written past the caches, and float32 results are wherever there is AVX-512: by whole
    lines, at the begin of which not every row of 4100 begins."""
    rows, inner = 1030, 256
    weight, shape = random(features, inner, dtype=torch.bfloat16, seed=1), WeightShape(features, inner)
    packed, x = pack(weight.clone()), part_of_wider(rows, inner, torch.bfloat16)
    wide = product_reference(x, weight, widened=True)
    assert rows * features * 2 > 2**23
    assert_close(by_any_number_of_threads(lambda: product(x, packed, shape)), wide.bfloat16(), inner)
    assert_close(by_any_number_of_threads(lambda: product(x, packed, shape, widened=True)), wide, inner)
