"""The host tier: content of KV blocks that had to leave the device, kept in host memory under the prefix cache's keys.

Only bookkeeping: what has to be moved is listed, travels in the next step, and a worker moves it before the step computes. A host
block is in one of these places::

    free --store--> leaving --its step is sealed--> moving --and committed--> found --oldest, when a block is wanted--> free
                                                      |                       |   ^
                                                      +--or failed--> free    +---+  pinned while the step that reads it is made

Content that is in a step in flight cannot be found until that is committed: should the step fail, nobody has relied on it. What is
leaving can: whoever reads it is in the same step, which moves out before it moves in. Blocks stay here when their content goes back to
the device; when that leaves again, there is nothing to move.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kvloom.errors import InternalError
from kvloom.interfaces.step import BlockMove, Step
from kvloom.interfaces.worker import HostTierReport

Key = tuple[int, bytes]
"""KV group and content digest."""


class HostTier:
    """Host blocks 1 .. num_blocks, and what they hold.

    Args:
        num_blocks: that the workers allocated on the host.
        worth_tokens: tokens from which on moving a column of blocks costs less than computing its tokens again.
    """

    def __init__(self, num_blocks: int, worth_tokens: int) -> None:
        self.num_blocks, self.worth_tokens = num_blocks, worth_tokens
        self._free = list(range(num_blocks, 0, -1))
        self._leaving: dict[Key, int] = {}
        self._moving: dict[Key, int] = {}
        self._found: OrderedDict[Key, int] = OrderedDict()  # oldest first
        self._pinned: dict[Key, int] = {}
        self._out: list[BlockMove] = []
        self._in: list[BlockMove] = []

    @classmethod
    def of(cls, report: HostTierReport | None, num_groups: int, block_tokens: int) -> HostTier | None:
        """The tier that a worker offers; None where there is none, or where even a full column is computed faster than moved."""
        if report is None or report.num_blocks < 1:
            return None
        worth_tokens = report.worth_tokens(num_groups)
        return cls(report.num_blocks, worth_tokens) if worth_tokens <= block_tokens else None

    def __len__(self) -> int:
        return len(self._found) + len(self._pinned) + len(self._leaving)

    def has(self, group: int, digest: bytes) -> bool:
        """Whether this content can be brought back."""
        key = (group, digest)
        return key in self._found or key in self._leaving or key in self._pinned

    def store(self, group: int, digest: bytes, device_block: int) -> None:
        """The content of a device block is about to be lost: move it here in the next step, unless it is here or nothing has room."""
        key = (group, digest)
        if key in self._found:
            self._found.move_to_end(key)
        if key in self._moving or self.has(group, digest):
            return
        if not self._free and self._found:
            self._free.append(self._found.popitem(last=False)[1])
        if self._free:
            self._leaving[key] = self._free.pop()
            self._out.append(BlockMove(group, device_block, self._leaving[key]))

    def pin(self, keys: Iterable[Key]) -> None:
        """Keep these, which can be found, until the step that is being made is sealed: it must not overwrite what it reads."""
        for key in keys:
            if key in self._found:
                self._pinned[key] = self._found.pop(key)

    def bring(self, key: Key, device_block: int) -> None:
        """Move pinned content to a device block in the next step."""
        host_block = self._leaving[key] if key in self._leaving else self._pinned[key]
        self._in.append(BlockMove(key[0], device_block, host_block))

    def take_moves(self) -> tuple[tuple[BlockMove, ...], tuple[BlockMove, ...]]:
        """``swap_out, swap_in`` of the step that is sealed now."""
        moves = tuple(self._out), tuple(self._in)
        self._found.update(self._pinned)
        self._moving.update(self._leaving)
        self._leaving, self._pinned, self._out, self._in = {}, {}, [], []
        return moves

    def landed(self, step: Step, *, done: bool) -> None:
        """A step is over. Unless it is `done`, nobody knows whether its moves happened."""
        arrived = {move.host_block for move in step.swap_out}
        for key, block in list(self._moving.items()) if arrived else ():
            if block in arrived:
                del self._moving[key]
                if done:
                    self._found[key] = block
                else:
                    self._free.append(block)

    def clear(self) -> None:
        """Forget everything that is not moving in a step in flight."""
        self._free += [*self._found.values(), *self._leaving.values()]
        self._found.clear()
        self._leaving, self._out = {}, []

    def check_integrity(self, in_flight: Iterable[Step]) -> None:
        """Every block is in one place, and what is moving is on its way. Between steps only.

        Raises:
            InternalError: it is not.
        """
        blocks = sorted([*self._free, *self._leaving.values(), *self._moving.values(), *self._found.values()])
        if blocks != list(range(1, self.num_blocks + 1)) or self._pinned or self._in:
            raise InternalError(f"the host tier's blocks 1 to {self.num_blocks} should be in one place each: free {self._free}, "
                                f"leaving {self._leaving}, moving {self._moving}, found {self._found}, pinned {self._pinned}")
        in_steps = sorted(move.host_block for step in in_flight for move in step.swap_out)
        if in_steps != sorted(self._moving.values()) or [m.host_block for m in self._out] != list(self._leaving.values()):
            raise InternalError(f"host blocks {in_steps} are on their way and {self._out} will be, but the tier has moving "
                                f"{self._moving} and leaving {self._leaving}")
