"""What a device remembers of sequences, a row each, and the numbers of one step that are gathered from it there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvloom.interfaces.state import KVGroup
from kvloom.runtime.device import ComputeDevice
from kvloom_kernels.gather import Places, Ranges, gather_blocks, gather_tokens


class GroupTensors(NamedTuple):
    """Of one KV group for one step: ``block_table [R, B]`` int32, ``slots [T]`` int64, see `AttentionBatch`."""

    block_table: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Of T tokens in R ranges, on the device.

    Args:
        token_ids: ``[T]`` int64.
        places: row and position of each token.
        extras: ``[T]`` int64 each, by the names that the model asked for.
        groups: by KV group.
    """

    token_ids: Tensor
    places: Places
    extras: Mapping[str, Tensor]
    groups: tuple[GroupTensors, ...]

    def part(self, ranges: int, tokens: int, columns: Sequence[int]) -> StepTensors:
        """The first ones of it: views. `columns` of the block tables, by group."""
        return StepTensors(self.token_ids[:tokens], Places(*(own[:tokens] for own in self.places)),
                           {name: own[:tokens] for name, own in self.extras.items()},
                           tuple(GroupTensors(group.block_table[:ranges, :few], group.slots[:tokens])
                                 for group, few in zip(self.groups, columns, strict=True)))


class SequenceTables:
    """Of up to `max_num_seqs` sequences of up to `max_model_len` tokens.

    Attributes:
        max_num_seqs: rows that sequences may have.
        token_ids, extras, blocks: tables of `device`, by row and position, of blocks by KV group and place in the sequence.
        nobody: a row that belongs to no sequence: token 0, and the blocks of nobody.
    """

    def __init__(self, device: ComputeDevice, max_num_seqs: int, max_model_len: int, groups: Sequence[KVGroup],
                 extra_inputs: Sequence[str] = ()) -> None:
        rows = max_num_seqs + 1
        self.max_num_seqs = self.nobody = max_num_seqs  # the row after theirs
        self.token_ids = device.table(rows, max_model_len + 1)
        self.extras = {name: device.table(rows, max_model_len + 1) for name in extra_inputs}
        self.block_tokens = tuple(g.block_tokens for g in groups)
        self.blocks = tuple(device.table(rows, -(-max_model_len // size)) for size in self.block_tokens)
        self._device = device.torch_device

    def columns(self, context_tokens: int) -> list[int]:
        """Of block tables for contexts of so many tokens, by group."""
        return [-(-context_tokens // size) for size in self.block_tokens]

    def tensors(self, ranges: int, tokens: int, columns: Sequence[int]) -> StepTensors:
        """Memory for a step, uninitialised."""
        return StepTensors(self._tokens(tokens), Places(self._tokens(tokens), self._tokens(tokens)),
                           {name: self._tokens(tokens) for name in self.extras},
                           tuple(self._group(ranges, tokens, few) for few in columns))

    def no_group(self) -> GroupTensors:
        """That of layers which keep nothing."""
        return self._group(0, 0, 0)

    def _tokens(self, tokens: int) -> Tensor:
        return torch.empty(tokens, dtype=torch.int64, device=self._device)

    def _group(self, ranges: int, tokens: int, columns: int) -> GroupTensors:
        return GroupTensors(torch.empty((ranges, columns), dtype=torch.int32, device=self._device), self._tokens(tokens))

    def gather(self, ranges: Ranges, into: StepTensors) -> None:
        """Fill `into` with a step's numbers. Nobody waits for the device."""
        for table in (self.token_ids, *self.extras.values(), *self.blocks):
            table.send()
        gather_tokens(self.token_ids.tensor, ranges, into.token_ids, into.places)
        for name, values in into.extras.items():
            values.copy_(self.extras[name].tensor[into.places])
        for table, size, group in zip(self.blocks, self.block_tokens, into.groups, strict=True):
            gather_blocks(table.tensor, ranges, into.places, size, *group)
