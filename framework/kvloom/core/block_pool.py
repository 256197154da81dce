"""Block ids: who holds them how often, and which one is handed out next. Knows nothing of their contents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kvloom.errors import InternalError

NULL_BLOCK = 0
"""Stands in a block table where there is nothing (any more). Never handed out."""


class BlockPool:
    """One pool for all KV groups: ids 1 .. num_blocks - 1, each with a reference count. Every operation is O(1).

    A free block lies in one of two places::

        spare   content is of no use to anybody; handed out first, last in first out
        kept    content may be found again by the prefix cache; handed out when nothing is spare, least recently freed first

    Args:
        num_blocks: blocks that the workers allocated, the null block included.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._spare = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out at all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._spare) + len(self._kept)

    def is_free(self, block: int) -> bool:
        """Whether nobody holds `block`."""
        return self._references[block] == 0

    def is_shared(self, block: int) -> bool:
        """Whether more than one holds `block`."""
        return self._references[block] > 1

    def allocate(self) -> int:
        """A block with one reference. Whatever was known about its content is void.

        Raises:
            InternalError: nothing is free; callers look at `num_free` first.
        """
        if self._spare:
            block = self._spare.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
        else:
            raise InternalError(f"a block was asked for, but all {self.num_usable} are held")
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a block that is held or kept.

        Raises:
            InternalError: the block is spare: its content is nobody's.
        """
        if self._references[block] == 0:
            if block not in self._kept:
                raise InternalError(f"block {block} is shared, but nobody holds it and its content was not kept")
            del self._kept[block]
        self._references[block] += 1

    def release(self, block: int, *, keep: bool) -> None:
        """One holder less; the last one decides whether the content is kept.

        Raises:
            InternalError: nobody holds it.
        """
        references = self._references[block] - 1
        if references < 0 or block == NULL_BLOCK:
            raise InternalError(f"block {block} is given back, but nobody holds it")
        self._references[block] = references
        if references == 0:
            if keep:
                self._kept[block] = None
            else:
                self._spare.append(block)

    def drop_kept(self) -> None:
        """Make every kept block spare: the prefix cache was emptied."""
        self._spare.extend(self._kept)
        self._kept.clear()

    def check_integrity(self, held: Iterable[int]) -> None:
        """`held`: every reference there should be, a block once a holder.

        Raises:
            InternalError: a count is wrong, or a free block is missing, listed twice or also held.
        """
        expected = [0] * self.num_blocks
        for block in held:
            expected[block] += 1
        if expected != self._references:
            wrong = {b: (n, e) for b, (n, e) in enumerate(zip(self._references, expected, strict=True)) if n != e}
            raise InternalError(f"reference counts are wrong; block: (counted, held): {wrong}")
        free = sorted([*self._spare, *self._kept])
        if free != [b for b in range(1, self.num_blocks) if expected[b] == 0]:
            raise InternalError(f"the free blocks are {free}, the held ones {[b for b, n in enumerate(expected) if n]}")
