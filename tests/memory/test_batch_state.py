"""What a worker remembers of sequences, against plain lists: on the host, and sent to a device with memory of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.errors import InternalError
from kvloom.interfaces import BlockCopy, KVGroup, NewSequence, StateKind, Step, TokenRange
from kvloom.params import SamplingParams
from kvloom.runtime.batch import BatchState, StepRanges
from kvloom.runtime.buffers import StepBuffers
from kvloom.runtime.device import CpuDevice
from kvloom.runtime.table import HostTable, SentTable, Table
from kvloom.runtime.tables import SequenceTables

GROUPS = (KVGroup(0, StateKind.FULL, (0,), 4), KVGroup(1, StateKind.WINDOW, (1,), 3, 8))
MOST, LONGEST, BUDGET = 3, 24, 40
GREEDY = SamplingParams(temperature=0)
CPU = torch.device("cpu")


class Remote(CpuDevice):
    """Its tables are sent, as those of a GPU are."""

    def table(self, rows: int, columns: int) -> Table:
        return SentTable(rows, columns, self.torch_device)


EACH_DEVICE = pytest.mark.parametrize("device", [CpuDevice(), Remote()], ids=["host", "sent"])


# -- one table


@given(st.lists(st.one_of(
    st.tuples(st.integers(0, 2), st.integers(0, 4), st.lists(st.integers(0, 99), max_size=3)),
    st.tuples(st.lists(st.integers(0, 2), unique=True, max_size=3), st.integers(0, 6)),
    st.none(),
), max_size=12))
def test_a_table_has_what_was_written_last(writes: list) -> None:
    tables, expected = [HostTable(3, 7), SentTable(3, 7, CPU)], np.zeros((3, 7), np.int32)
    for i, write in enumerate(writes):
        if write is None:
            for table in tables:
                table.send()
                assert table.tensor.tolist() == expected.tolist()
        elif len(write) == 3:
            row, start, values = write
            expected[row, start:start + len(values)] = values
            for table in tables:
                table.write(row, start, values)
        else:
            rows, column = np.array(write[0], np.int64), np.full(len(write[0]), write[1])
            values = 100 + i + np.arange(len(rows))
            expected[rows, column] = values
            for table in tables:
                table.write_each(rows, column, torch.from_numpy(values))
    for table in tables:
        table.send()
        assert table.tensor.tolist() == expected.tolist()


def test_what_waits_is_that_of_the_time_when_it_was_written() -> None:
    table, values = SentTable(1, 3, CPU), np.arange(3)
    table.write(0, 0, values)
    values[:] = 9
    table.send()
    assert table.tensor.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("table", [HostTable(2, 3), SentTable(2, 3, CPU)], ids=["host", "sent"])
@pytest.mark.parametrize(("start", "values"), [(-1, [5]), (3, [5]), (1, [5, 6, 7])])
def test_what_a_row_does_not_take_is_refused(table: Table, start: int, values: list[int]) -> None:
    with pytest.raises(InternalError, match=f"{len(values)} numbers from column {start} on are more"):
        table.write(0, start, values)
    table.write(0, 3, [])
    table.send()
    assert not table.tensor.any()


def test_what_could_not_be_sent_waits_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvloom.runtime import table as module

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    table = SentTable(1, 3, CPU)
    table.write(0, 1, (5,))
    with monkeypatch.context() as patch:
        patch.setattr(module, "to_device", full)
        with pytest.raises(torch.OutOfMemoryError):
            table.send()
    table.send()
    assert table.tensor.tolist() == [[0, 5, 0]]


# -- sequences


@dataclass
class Known:
    """A sequence as lists."""

    tokens: list[int]
    kinds: list[int]
    blocks: list[list[int]] = field(default_factory=lambda: [[], []])

    def grow(self, fresh: Any) -> tuple[tuple[int, ...], ...]:
        """Blocks for all of its tokens; the new ones."""
        new = [[next(fresh) for _ in range(-(-len(self.tokens) // g.block_tokens) - len(own))] for g, own in zip(GROUPS, self.blocks, strict=True)]
        for own, more in zip(self.blocks, new, strict=True):
            own += more
        return tuple(map(tuple, new))


@EACH_DEVICE
@settings(max_examples=150)
@given(data=st.data())
def test_steps_have_the_numbers_of_their_sequences_whoever_had_their_rows_before(device: CpuDevice, data: Any) -> None:
    tables = SequenceTables(device, MOST, LONGEST, GROUPS, ("kinds",))
    state, buffers = BatchState(tables), StepBuffers(tables, MOST, BUDGET, LONGEST, device)
    known: dict[int, Known] = {}
    fresh, ids = count(1), count()
    numbers = st.integers(0, 1000)
    for step_id in range(data.draw(st.integers(1, 6))):
        finished = tuple(i for i in known if data.draw(st.booleans()))
        for i in finished:
            del known[i]
        new = []
        for i in (next(ids) for _ in range(data.draw(st.integers(0, MOST - len(known))))):
            own = known[i] = Known(data.draw(st.lists(numbers, min_size=1, max_size=LONGEST - 8)), data.draw(st.lists(numbers, max_size=5)))
            extras = {"kinds": tuple(own.kinds)} if own.kinds else {}
            new.append(NewSequence(i, tuple(own.tokens), len(own.tokens), 0, own.grow(fresh), GREEDY, extras=extras))
        copies = []
        for i in (i for i in known if data.draw(st.booleans())):  # those that are new have no blocks to be appended in their first step
            if all(n.sequence_id != i for n in new):
                copies.append(BlockCopy(0, known[i].blocks[0][-1], next(fresh), i))
                known[i].blocks[0][-1] = copies[-1].target
        ranges = []
        for i, own in known.items():
            given_ = ()
            if data.draw(st.booleans()):  # a decoder chose the last ones
                given_ = tuple(data.draw(st.lists(numbers, min_size=1, max_size=len(own.tokens))))
                own.tokens[-len(given_):] = given_
            tokens = data.draw(st.integers(len(given_) or 1, len(own.tokens)))
            ranges.append(TokenRange(i, len(own.tokens) - tokens, tokens, own.grow(fresh), sample=True, given=given_))
        step = Step(step_id, tuple(ranges), tuple(new), finished=finished, copies=tuple(copies))
        for _ in range(data.draw(st.integers(1, 2))):  # it may come again
            state.apply(step)
        if ranges:
            flat = state.flatten(step)
            assert_gathered(buffers, flat, [known[r.sequence_id] for r in ranges], ranges, data.draw(st.integers(0, MOST - len(ranges))))
            sampled = [data.draw(numbers) for _ in ranges]
            state.write_sampled(flat.rows, flat.context_tokens, torch.tensor(sampled))
            for r, token in zip(ranges, sampled, strict=True):
                if len(known[r.sequence_id].tokens) < LONGEST:
                    known[r.sequence_id].tokens.append(token)


def assert_gathered(buffers: StepBuffers, flat: StepRanges, owners: list[Known], ranges: list[TokenRange],
                    more: int) -> None:
    """What a step of `ranges`, and of `more` rows that belong to nobody, is computed from."""
    buffers.fill(flat, len(ranges) + more)
    tokens = sum(r.num_tokens for r in ranges)
    inputs, batches = buffers.inputs(BUDGET), buffers.batches(MOST, BUDGET, BUDGET)
    places = [(own, place) for own, r in zip(owners, ranges, strict=True) for place in range(r.start, r.start + r.num_tokens)]
    assert inputs.token_ids[:tokens + more].tolist() == [own.tokens[place] for own, place in places] + [0] * more
    assert inputs.positions[0, :tokens + more].tolist() == [place for _, place in places] + [0] * more
    beyond = MOST - len(ranges) - more
    for batch, group, g in zip(batches, GROUPS, (0, 1), strict=True):
        size = group.block_tokens
        assert batch.context_tokens.tolist() == [r.start + r.num_tokens for r in ranges] + [1] * more + [0] * beyond
        ends = np.cumsum([r.num_tokens for r in ranges] + [1] * more + [0] * beyond).tolist()
        assert batch.query_starts.tolist() == [0, *ends]
        assert batch.slots[:tokens + more].tolist() == [own.blocks[g][place // size] * size + place % size for own, place in places] + [0] * more
        longest = -(-max(r.start + r.num_tokens for r in ranges) // size)
        for row, own, r in zip(batch.block_table, owners, ranges, strict=False):
            needed = -(-(r.start + r.num_tokens) // size)
            assert row[:longest].tolist() == own.blocks[g][:needed] + [0] * (longest - needed)
        assert batch.block_table[len(ranges):len(ranges) + more, :longest].eq(0).all()
    kinds = [own.kinds[place] if place < len(own.kinds) else 0 for own, place in places]
    assert inputs.extras["kinds"][:tokens + more].tolist() == kinds + [0] * more


@EACH_DEVICE
def test_ranges_beyond_a_step_are_empty_again_after_a_larger_one(device: CpuDevice) -> None:
    tables = SequenceTables(device, 4, 40, GROUPS[:1])
    buffers = StepBuffers(tables, 4, 8, 40, device)
    for starts, contexts in (([0, 1, 3, 5], [9, 2, 30]), ([0, 4], [4])):
        buffers.fill(StepRanges(np.arange(len(contexts)), np.array(starts, np.int32), np.array(contexts, np.int32), np.arange(0)))
        (batch,) = buffers.batches(4, 8, 8)
        for found in (batch.query_starts.tolist(), batch.query_starts_host.tolist()):
            assert found == starts + starts[-1:] * (5 - len(starts))
        for found in (batch.context_tokens.tolist(), batch.context_tokens_host.tolist()):
            assert found == contexts + [0] * (4 - len(contexts))


def test_more_sequences_than_there_may_be_are_an_error_of_ours() -> None:
    state = BatchState(SequenceTables(CpuDevice(), 1, 8, ()))
    new = tuple(NewSequence(i, (1,), 1, 0, (), GREEDY) for i in range(2))
    with pytest.raises(InternalError, match="more than 1 sequences"):
        state.apply(Step(0, (), new))
