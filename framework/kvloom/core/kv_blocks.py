"""Block tables: which blocks hold a sequence's state, one table per KV group, all groups out of one pool.

All tables of a sequence have the same length; entry j of each stands for tokens [j * block_tokens, (j + 1) * block_tokens).
A column is entry j of all groups. In a window group the entries that no later token reads are 0, and their blocks went back::

    full     [ 7  9  3  4 ]
    window   [ 0  0  5  6 ]      dropped = 2

A model that keeps nothing has no groups: its tables are always empty, and every sequence fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvloom.core.block_pool import NULL_BLOCK, BlockPool
from kvloom.core.host_tier import HostTier, Key
from kvloom.core.prefix_cache import ALL_BLOCKS, BlockHasher, PrefixCache
from kvloom.errors import ConfigError, InternalError, UnsupportedFeatureError
from kvloom.interfaces.state import KVGroup, StateKind
from kvloom.interfaces.step import BlockCopy, BlockIds, BlockMove, Step

if TYPE_CHECKING:
    from kvloom.core.request import Request

Moves = tuple[tuple[BlockMove, ...], tuple[BlockMove, ...]]


NO_BLOCKS = 1
"""Blocks of a pool of which none is usable: the null block."""
UNBOUNDED_TOKENS = 2**62
"""How many fit where none takes a block."""


class BlockTable:
    """The blocks of one sequence.

    Attributes:
        groups: one list of block ids a KV group.
        capacity_tokens: tokens that the columns hold.
        dropped: per group, how many leading entries are 0.
        published: leading columns that were offered to the prefix cache.
    """

    __slots__ = ("capacity_tokens", "dropped", "groups", "published")

    def __init__(self, num_groups: int) -> None:
        self.groups: tuple[list[int], ...] = tuple([] for _ in range(num_groups))
        self.capacity_tokens = 0
        self.dropped = [0] * num_groups
        self.published = 0

    def ids(self) -> BlockIds:
        """As a `Step` carries it."""
        return tuple(map(tuple, self.groups))

    def held(self) -> Iterator[int]:
        """Blocks of all groups, last columns first: the order in which they should be reused."""
        for blocks in self.groups:
            for block in reversed(blocks):
                if block != NULL_BLOCK:
                    yield block


class Hit(NamedTuple):
    """Leading tokens whose state is still there, and where.

    Fields:
        tokens: how many.
        blocks: per group and column the device block; None where none is needed, or where the content is on the host.
        on_host: column and content of those.
    """

    tokens: int
    blocks: tuple[list[int | None], ...]
    on_host: tuple[tuple[int, Key], ...] = ()


class KVBlocks:
    """Gives blocks to sequences and takes them back; keeps what the prefix cache may find again.

    Args:
        groups: of the model, all with one block size; none where no layer keeps state.
        num_blocks: of the pool, the null block included.
        cached: whether blocks are kept for later requests; those of a prompt that siblings share always are.
        tier: where content goes when its block is needed for something else.

    Raises:
        UnsupportedFeatureError: a group of a kind whose state is not kept per token.
        ConfigError: groups of different block sizes, or no usable block.
    """

    def __init__(self, groups: Sequence[KVGroup], num_blocks: int, *, cached: bool, tier: HostTier | None = None) -> None:
        _check_groups(groups, num_blocks)
        self.block_tokens = groups[0].block_tokens if groups else 1
        self._groups = tuple(groups)
        self._windows = [(g.index, g.window_tokens) for g in groups if g.window_tokens is not None]
        # A window of w tokens reads w - 1 tokens before the one that is computed.
        reach = [ALL_BLOCKS if g.window_tokens is None else self._columns(g.window_tokens - 1) for g in groups]
        self._pool = BlockPool(num_blocks if groups else NO_BLOCKS)
        self._hasher = BlockHasher(self.block_tokens)
        self._cached = cached
        self._cache = PrefixCache(reach)
        self._tier = tier

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds; some may be kept for the prefix cache."""
        return self._pool.num_free

    @property
    def num_usable(self) -> int:
        """Blocks that there are, the null block not counted."""
        return self._pool.num_usable

    def new_table(self) -> BlockTable:
        """An empty one."""
        return BlockTable(len(self._groups))

    def _columns(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    # -- how much a sequence needs

    def needed_by_group(self, num_tokens: int, *, chunked: bool) -> list[int]:
        """Most blocks per group that computing `num_tokens` tokens of one sequence holds at a time, taken a column at a time.

        A window group gives blocks back as it goes: it needs the reach of the window and the column being written. Not so when
        all tokens are computed in one step.
        """
        return [g.max_blocks(num_tokens, 1 if chunked else num_tokens) for g in self._groups]

    def tokens_that_fit(self, request: Request) -> int:
        """How many tokens more than `scheduled_tokens` its blocks and the free ones hold."""
        if not self._groups:
            return UNBOUNDED_TOKENS
        free_columns = self._pool.num_free // len(self._groups)
        return request.table.capacity_tokens + free_columns * self.block_tokens - request.scheduled_tokens

    def has_room_for(self, request: Request, hit: Hit, *, chunked: bool) -> bool:
        """Whether all its tokens, `hit` included, could be held by free blocks and by those that others share with it."""
        shared = sum(not self._pool.is_free(b) for blocks in hit.blocks for b in blocks if b is not None)
        return sum(self.needed_by_group(len(request.token_ids), chunked=chunked)) - shared <= self._pool.num_free

    # -- a sequence's blocks from admission to end

    def find_hit(self, request: Request) -> Hit:
        """What is left of its own state after it gave way, else the longest prefix on the device or in the host tier. The last token is
        never part of it: its logits are wanted."""
        columns = (len(request.token_ids) - 1) // self.block_tokens
        if not (self._keeps(request) and request.spec.read_prefix_cache and (len(self._cache) or self._tier)):
            return Hit(0, tuple([] for _ in self._groups))
        self._hasher.extend(request.digests, request.spec.cache_root, request.token_ids, columns)
        if self._tier is not None and request.lost_tokens and (own := self._own_state(request)) is not None:
            return own
        columns = self._cache.longest_hit(request.digests[:columns], self._tier)
        firsts = [self._cache.first_needed(g.index, columns) for g in self._groups]
        return self._located(columns * self.block_tokens, request.digests[:columns], firsts)

    def _own_state(self, request: Request) -> Hit | None:
        """All that it had computed when it gave way, if every block of that can still be found.

        A branch that was waiting for the others had computed its last token too; its candidates are wanted again.
        """
        tokens = min(request.lost_tokens, len(request.token_ids) - 1)
        full, rest = divmod(tokens, self.block_tokens)
        digests = request.digests[:full]
        if rest:
            digests.append(self._hasher.partial(digests, request.spec.cache_root, request.token_ids, tokens))
        firsts = [self._unread_columns(g.window_tokens, tokens) for g in self._groups]
        found = all(self._is_somewhere(g, digest) for g, first in enumerate(firsts) for digest in digests[first:])
        return self._located(tokens, digests, firsts) if found else None

    def _is_somewhere(self, group: int, digest: bytes) -> bool:
        return self._cache.find(group, digest) is not None or (self._tier is not None and self._tier.has(group, digest))

    def _located(self, tokens: int, digests: Sequence[bytes], firsts: Sequence[int]) -> Hit:
        """A hit of columns with these contents, of each group from its column `firsts` on; all of them can be found."""
        blocks: list[list[int | None]] = []
        on_host: list[tuple[int, Key]] = []
        for g, first in enumerate(firsts):
            blocks.append([None if column < first else self._cache.find(g, digest) for column, digest in enumerate(digests)])
            on_host += [(c, (g, digests[c])) for c in range(first, len(digests)) if blocks[g][c] is None]
        return Hit(tokens, tuple(blocks), tuple(on_host))

    def _keeps(self, request: Request) -> bool:
        kept = self._cached or request.spec.shares_prompt or (self._tier is not None and request.lost_tokens > 0)
        return bool(self._groups) and kept

    def take_hit(self, request: Request, hit: Hit) -> None:
        """Make the hit's blocks the beginning of an empty table."""
        table = request.table
        for g, blocks in enumerate(hit.blocks):
            for block in blocks:
                if block is not None:
                    self._pool.share(block)
            table.groups[g].extend(NULL_BLOCK if b is None else b for b in blocks)
            table.dropped[g] = blocks.count(None)
        table.capacity_tokens = self._columns(hit.tokens) * self.block_tokens
        table.published = hit.tokens // self.block_tokens
        if self._tier is not None and hit.on_host:
            self._bring_back(table, hit, self._tier)

    def _bring_back(self, table: BlockTable, hit: Hit, tier: HostTier) -> None:
        """Device blocks for what is on the host. They can be found by others once a step has moved the content there."""
        tier.pin(key for _, key in hit.on_host)
        for column, key in hit.on_host:
            block = self._fresh_block()
            table.groups[key[0]][column] = block
            table.dropped[key[0]] -= 1
            table.published = min(table.published, column)
            tier.bring(key, block)

    def extend(self, request: Request, end_tokens: int) -> BlockIds:
        """Append the columns that tokens up to `end_tokens` need; the new ids by group, ``()`` when there are none."""
        table = request.table
        if end_tokens <= table.capacity_tokens:
            return ()
        columns = self._columns(end_tokens - table.capacity_tokens)
        new = tuple(tuple(self._fresh_block() for _ in range(columns)) for _ in self._groups)
        for blocks, ids in zip(table.groups, new, strict=True):
            blocks.extend(ids)
        table.capacity_tokens += columns * self.block_tokens
        return new

    def _fresh_block(self) -> int:
        block = self._pool.allocate()
        if self._tier is not None and (key := self._cache.key_of(block)) is not None:
            self._tier.store(*key, block)
        self._cache.forget(block)
        return block

    def settle(self, request: Request) -> None:
        """After `computed_tokens` moved: make full blocks findable, and give back what fell out of a window."""
        table = request.table
        if self._keeps(request) and request.computed_tokens // self.block_tokens > table.published:
            self._publish(request, request.computed_tokens // self.block_tokens)
        for g, window_tokens in self._windows:
            # The next token reads from position computed - window + 1 on; steps in flight start no earlier.
            unread = self._unread_columns(window_tokens, request.computed_tokens)
            if unread > table.dropped[g]:
                self._drop(table, g, unread)

    def _unread_columns(self, window_tokens: int | None, computed_tokens: int) -> int:
        """Leading columns that no token after the first `computed_tokens` reads."""
        return 0 if window_tokens is None else max(0, computed_tokens - window_tokens + 1) // self.block_tokens

    def _publish(self, request: Request, full_columns: int) -> None:
        table = request.table
        self._hasher.extend(request.digests, request.spec.cache_root, request.token_ids, full_columns)
        for column in range(table.published, full_columns):
            for g, blocks in enumerate(table.groups):
                if blocks[column] != NULL_BLOCK:
                    self._cache.insert(g, request.digests[column], blocks[column])
        table.published = full_columns

    def _drop(self, table: BlockTable, group: int, columns: int) -> None:
        blocks = table.groups[group]
        for column in range(table.dropped[group], columns):
            self._release(blocks[column])
            blocks[column] = NULL_BLOCK
        table.dropped[group] = columns

    def set_aside(self, request: Request) -> None:
        """Take back everything of a sequence that gives way; with a host tier, so that its state can be found again.

        Full blocks stay on the device until they are needed for something else. The last one is moved out at once, where that costs
        less than computing its tokens again.
        """
        full, rest = divmod(request.computed_tokens, self.block_tokens)
        if self._tier is not None and request.spec.read_prefix_cache and request.computed_tokens:
            self._publish(request, full)
            if rest >= self._tier.worth_tokens:
                digest = self._hasher.partial(request.digests, request.spec.cache_root, request.token_ids, request.computed_tokens)
                for g, blocks in enumerate(request.table.groups):
                    self._tier.store(g, digest, blocks[full])
        self.free(request)

    # -- sequences that branch

    def fork(self, table: BlockTable) -> BlockTable:
        """Another table with the same blocks, each of which has one holder more."""
        fork = self.new_table()
        for blocks, own in zip(table.groups, fork.groups, strict=True):
            own.extend(blocks)
        fork.capacity_tokens, fork.dropped, fork.published = table.capacity_tokens, list(table.dropped), table.published
        for block in fork.held():
            self._pool.share(block)
        return fork

    def shared_ahead(self, request: Request) -> list[int]:
        """Groups whose block for the next token is there, and others hold it too: it may not be written."""
        column = request.scheduled_tokens // self.block_tokens
        return [g for g, blocks in enumerate(request.table.groups) if column < len(blocks) and self._pool.is_shared(blocks[column])]

    def make_private(self, request: Request, groups: Sequence[int]) -> list[BlockCopy]:
        """Put a copy of its own in the place of each block that `shared_ahead` found; takes as many free blocks."""
        column, copies = request.scheduled_tokens // self.block_tokens, []
        for g in groups:
            blocks = request.table.groups[g]
            copies.append(BlockCopy(g, blocks[column], self._fresh_block(), request.sequence_id))
            self._release(blocks[column])
            blocks[column] = copies[-1].target
        return copies

    def free(self, request: Request) -> None:
        """Take back everything; the request has an empty table afterwards."""
        for block in request.table.held():
            self._release(block)
        request.table = self.new_table()

    def _release(self, block: int) -> None:
        self._pool.release(block, keep=self._cache.holds(block))

    def forget_prefixes(self) -> bool:
        """Empty the prefix cache. False, and nothing happens, while sequences hold blocks."""
        if self._pool.num_free != self._pool.num_usable:
            return False
        self._cache.clear()
        self._pool.drop_kept()
        if self._tier is not None:
            self._tier.clear()
        return True

    # -- moves between device and host

    def take_moves(self) -> Moves:
        """``swap_out, swap_in`` of the step that is sealed now."""
        return ((), ()) if self._tier is None else self._tier.take_moves()

    def landed(self, step: Step, *, done: bool) -> None:
        """A step is over; see `HostTier.landed`."""
        if self._tier is not None:
            self._tier.landed(step, done=done)

    def check_integrity(self, requests: Iterable[Request], in_flight: Iterable[Step]) -> None:
        """Every block is held exactly by the tables that list it, the tables are well-formed, and so is the host tier.

        Raises:
            InternalError: something does not add up.
        """
        tables = [r.table for r in requests]
        for table in tables:
            sizes = {len(blocks) * self.block_tokens for blocks in table.groups}
            if self._groups and sizes != {table.capacity_tokens}:
                raise InternalError(f"a table of {table.capacity_tokens} tokens has groups of {sizes} tokens")
            for dropped, blocks in zip(table.dropped, table.groups, strict=True):
                if any(blocks[:dropped]) or not all(blocks[dropped:]):
                    raise InternalError(f"{dropped} leading entries should be 0, and no others: {blocks}")
        self._pool.check_integrity(block for table in tables for block in table.held())
        self._cache.check_integrity()
        if self._tier is not None:
            self._tier.check_integrity(in_flight)


def _check_groups(groups: Sequence[KVGroup], num_blocks: int) -> None:
    """Refuse what block tables of this kind cannot serve."""
    for position, g in enumerate(groups):
        if g.kind not in (StateKind.FULL, StateKind.LATENT, StateKind.WINDOW):
            raise UnsupportedFeatureError("KV group", g.kind.value, "layers may keep full, latent or window state")
        if g.index != position or (g.kind is StateKind.WINDOW) != (g.window_tokens is not None):
            raise InternalError(f"KV group {g} at position {position}: wrong index, or a window without a size")
    if len({g.block_tokens for g in groups}) > 1:
        raise ConfigError(f"all KV groups need one block size, got {sorted({g.block_tokens for g in groups})}")
    if groups and num_blocks < 2:
        raise ConfigError(f"the KV cache needs at least 2 blocks (one is the null block), got {num_blocks}")
