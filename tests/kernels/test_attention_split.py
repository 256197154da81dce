"""A query's bits do not depend on how its context is shared out among threads, nor on the rows beside it (`row_invariant`)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_attention_shapes import EACH_DTYPE, PEAK, heads_of
from test_kernel_threads import threads

from kvloom_kernels.attention import Scores, kernel_caches, paged_attention
from kvloom_kernels.native import problem

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")
LONG = [700, 1300, 2100]
"""Contexts of two, three and five times 512 keys, which are what one thread takes at least."""
SHORT = [33 + 7 * i for i in range(12)]
PROMPT = (60, 40)
"""Context, and tokens of the step: too many of them for the context to be shared out."""
KV_HEADS, GROUP = 2, 3
WORKSPACE_BYTES = 2**18
"""Enough for the parts of all long rows, and quickly looked through."""
EACH_SHAPE = pytest.mark.parametrize(("dim", "block_tokens"), [(64, 16), (20, 5)], ids=["whole tiles", "odd"])


class Step:
    """Rows of (context, tokens of the step), and calls of the kernel for some of them, with one workspace."""

    def __init__(self, rows: Sequence[tuple[int, int]], dtype: torch.dtype, dim: int, block_tokens: int, window: int | None = None) -> None:
        generator, columns = torch.Generator().manual_seed(0), -(-max(context for context, _ in rows) // block_tokens)
        blocks = len(rows) * columns
        self.tables = torch.randperm(blocks, generator=generator).int().view(len(rows), columns)
        self.caches = kernel_caches(*(torch.randn(blocks, KV_HEADS, block_tokens, dim, generator=generator).to(dtype) for _ in range(2)))
        self.contexts = torch.tensor([context for context, _ in rows], dtype=torch.int32)
        self.q = [heads_of(tokens, KV_HEADS * GROUP, dim, dtype, generator) for _, tokens in rows]
        self.scores, self.block_tokens = Scores(PEAK * dim**-0.5, window), block_tokens
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8)

    def attend(self, chosen: Sequence[int], workspace_bytes: int = WORKSPACE_BYTES) -> list[torch.Tensor]:
        """The results of these rows, in one call."""
        counts = [len(self.q[row]) for row in chosen]
        q = torch.cat([self.q[row] for row in chosen])
        out, starts = torch.full_like(q, torch.nan), torch.tensor([0, *counts]).cumsum(0).int()
        paged_attention(q, *self.caches, self.tables[list(chosen)], starts, self.contexts[list(chosen)], self.scores, self.block_tokens,
                        self.workspace[:workspace_bytes], out)
        return list(out.split(counts))

    def is_shared_out(self, chosen: Sequence[int], workspace_bytes: int = WORKSPACE_BYTES) -> bool:
        """Whether a call leaves sums of parts of a context."""
        self.workspace.zero_()
        self.attend(chosen, workspace_bytes)
        return bool(self.workspace.any())


@EACH_DTYPE
@EACH_SHAPE
@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("tokens", [1, 5])
def test_bits_are_those_of_one_thread_alone_whoever_reads_which_keys(dtype: torch.dtype, dim: int, block_tokens: int, window: int | None,
                                                                     tokens: int) -> None:
    rows = [*((context, tokens) for context in LONG), *((context, 1) for context in SHORT), PROMPT]
    step, long, short, prompt = Step(rows, dtype, dim, block_tokens, window), [0, 1, 2], [*range(3, 3 + len(SHORT))], len(rows) - 1
    few, many = [[0], [1], [2], long, [2, 0, 1]], [[*short, *long], [*long, *short], [2, prompt], [prompt, *long]]
    with threads(1):
        expected = [step.attend([row])[0] for row in long]
    assert all(torch.isfinite(e).all() for e in expected)
    for count in (1, 2, 3):
        with threads(count):
            for chosen in (*few, *many):
                assert step.is_shared_out(chosen) == (count > 1 and chosen in few), (count, chosen)
                for _ in range(2):  # what counts the parts is ready for the next call
                    for row, found in zip(chosen, step.attend(chosen), strict=True):
                        assert row not in long or torch.equal(found, expected[row]), (count, chosen, row)


@EACH_DTYPE
@EACH_SHAPE
def test_without_room_for_its_parts_a_context_is_not_shared_out(dtype: torch.dtype, dim: int, block_tokens: int) -> None:
    step, small_bytes = Step([(2100, 1)], dtype, dim, block_tokens), 1024
    with threads(1):
        (expected,) = step.attend([0])
    with threads(2):
        assert step.is_shared_out([0])
        assert not step.is_shared_out([0], small_bytes)
        assert torch.equal(step.attend([0], small_bytes)[0], expected)
