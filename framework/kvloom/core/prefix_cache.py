"""Which block holds which content: SHA-256 chains over tokens, and the longest prefix that every KV group still has.

A digest stands for a whole prefix, so equal tokens after different beginnings never meet::

    root    = sha256(model revision, adapter, cache salt, media)      see `root_digest`
    block 0 = sha256(root    + its token ids as little-endian int64)
    block 1 = sha256(block 0 + its token ids as little-endian int64)  ...
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

from kvloom.errors import InternalError

if TYPE_CHECKING:
    from kvloom.core.host_tier import HostTier

ALL_BLOCKS = 2**62
"""Reach of a group whose layers see every earlier token."""


def root_digest(model_revision: str, adapter: str = "", cache_salt: str = "", media: Sequence[str] = ()) -> bytes:
    """What besides tokens decides the content of blocks; parts are prefixed with their length, so none can pose as another."""
    parts = [part.encode("utf-8", "surrogatepass") for part in (model_revision, adapter, cache_salt, *media)]
    return sha256(b"".join(struct.pack("<q", len(part)) + part for part in parts)).digest()


class BlockHasher:
    """Digests of a sequence's full blocks.

    Args:
        block_tokens: tokens in a block.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._pack = struct.Struct(f"<{block_tokens}q").pack

    def extend(self, digests: list[bytes], root: bytes, token_ids: Sequence[int], num_blocks: int) -> None:
        """Make `digests` at least `num_blocks` long. Each block of a sequence is hashed once in its life."""
        size, previous = self._block_tokens, digests[-1] if digests else root
        for start in range(len(digests) * size, num_blocks * size, size):
            previous = sha256(previous + self._pack(*token_ids[start: start + size])).digest()
            digests.append(previous)

    def partial(self, digests: Sequence[bytes], root: bytes, token_ids: Sequence[int], num_tokens: int) -> bytes:
        """Digest of a block that holds only the last of `num_tokens` tokens, fewer than a block; no full block has the same."""
        full, rest = divmod(num_tokens, self._block_tokens)
        previous = digests[full - 1] if full else root
        return sha256(previous + struct.pack(f"<{rest}q", *token_ids[num_tokens - rest: num_tokens])).digest()


class PrefixCache:
    """Content of blocks that can be found again, by KV group.

    Args:
        reach_blocks: per group, how many blocks before a position a token there still reads: `ALL_BLOCKS` for full attention.
    """

    def __init__(self, reach_blocks: Sequence[int]) -> None:
        self._reach_blocks = tuple(reach_blocks)
        self._block_of: tuple[dict[bytes, int], ...] = tuple({} for _ in reach_blocks)
        self._key_of: dict[int, tuple[int, bytes]] = {}

    def __len__(self) -> int:
        return len(self._key_of)

    def holds(self, block: int) -> bool:
        """Whether the block's content can be found."""
        return block in self._key_of

    def key_of(self, block: int) -> tuple[int, bytes] | None:
        """Group and digest of the block's content, where it can be found."""
        return self._key_of.get(block)

    def find(self, group: int, digest: bytes) -> int | None:
        """The block that holds this content."""
        return self._block_of[group].get(digest)

    def insert(self, group: int, digest: bytes, block: int) -> None:
        """Make a block findable. When another block has this content already, that one stays the one that is found."""
        if self._block_of[group].setdefault(digest, block) == block:
            self._key_of[block] = (group, digest)

    def forget(self, block: int) -> None:
        """The block's content is void."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key[0]][key[1]]

    def clear(self) -> None:
        """Forget everything."""
        self._key_of.clear()
        for blocks in self._block_of:
            blocks.clear()

    def longest_hit(self, digests: Sequence[bytes], host: HostTier | None = None) -> int:
        """Largest h such that every group has, here or in the `host` tier, what a token right after the first h blocks reads.

        That is all h blocks for full attention, and the last `reach` of them for a window.
        """
        unbroken = [0] * len(self._reach_blocks)
        longest = 0
        for count, digest in enumerate(digests, 1):
            usable = True
            for group, reach in enumerate(self._reach_blocks):
                if digest in self._block_of[group] or (host is not None and host.has(group, digest)):
                    unbroken[group] += 1
                elif reach == ALL_BLOCKS:
                    return longest
                else:
                    unbroken[group] = 0
                usable &= unbroken[group] >= min(reach, count)
            if usable:
                longest = count
        return longest

    def first_needed(self, group: int, num_blocks: int) -> int:
        """The first of `num_blocks` blocks that a token right after them reads."""
        return max(0, num_blocks - self._reach_blocks[group])

    def check_integrity(self) -> None:
        """Both directions of the map agree.

        Raises:
            InternalError: they do not.
        """
        forward = {block: (g, digest) for g, blocks in enumerate(self._block_of) for digest, block in blocks.items()}
        if forward != self._key_of or len(forward) != sum(map(len, self._block_of)):
            raise InternalError("the prefix cache's maps from content to block and from block to content disagree")
