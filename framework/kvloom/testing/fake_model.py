"""A model without weights, and an executor that runs it over a simulated paged KV cache. Pure Python.

The next token is a hash of all tokens before it, so whatever goes wrong with blocks, cursors or the prefix cache gives another
token than a plain loop does (`FakeModel.generate`), or a `KVMismatchError` that says which slot of which block holds what.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from kvloom.errors import KvloomError, UnsupportedFeatureError
from kvloom.interfaces.executor import Executor
from kvloom.interfaces.state import KVGroup
from kvloom.interfaces.step import NewSequence, Pooled, RowError, RowResult, Step, StepResult, TokenLogprob, TokenRange
from kvloom.interfaces.worker import HostTierReport, WorkerFactory, WorkerReport


class KVMismatchError(KvloomError):
    """A step is not what the worker's state allows, or a block does not hold what its reader must find there."""


@dataclass(frozen=True, slots=True)
class FakeModel:
    """Prefix -> next token.

    Args:
        vocab_size: tokens are 0 .. vocab_size - 1.
        eos_token_id: comes up once in `eos_every` tokens on average; None: like any other token.
        eos_every: see there.
    """

    vocab_size: int = 50_000
    eos_token_id: int | None = None
    eos_every: int = 16

    def absorb(self, state: bytes, token_id: int) -> bytes:
        """The state after one more token; ``b""`` is the state before the first."""
        return blake2b(state + token_id.to_bytes(8, "little", signed=True), digest_size=8).digest()

    def next_token(self, state: bytes) -> int:
        """The token that follows."""
        number = int.from_bytes(state, "little")
        if self.eos_token_id is not None and number % self.eos_every == 0:
            return self.eos_token_id
        return (number >> 8) % self.vocab_size

    def candidates(self, state: bytes, count: int) -> tuple[TokenLogprob, ...]:
        """The best tokens that may follow, best first: `next_token`, and others as far behind it as the state says."""
        found = [self.next_token(state)]
        while len(found) < min(count, self.vocab_size):
            state = self.absorb(state, len(found))
            following = self.next_token(state)
            if following not in found:
                found.append(following)
        scale = 1 + state[0] / 64
        return tuple(TokenLogprob(token_id, -(i + 1) / scale, i + 1) for i, token_id in enumerate(found))

    def generate(self, prompt: Sequence[int], max_tokens: int, stop_token_ids: frozenset[int] = frozenset(), *,
                 ignore_eos: bool = False) -> list[int]:
        """The plain loop: output tokens, the end-of-text or stop token included."""
        ends = stop_token_ids if ignore_eos else stop_token_ids | {self.eos_token_id}
        state = b""
        for token_id in prompt:
            state = self.absorb(state, token_id)
        output: list[int] = []
        while len(output) < max_tokens:
            output.append(self.next_token(state))
            if output[-1] in ends:
                break
            state = self.absorb(state, output[-1])
        return output


    def pooled(self, prompt: Iterable[int]) -> Pooled:
        """What a pooling request gets: the state after its last token."""
        state = b""
        for token_id in prompt:
            state = self.absorb(state, token_id)
        return Pooled((len(state),), state)


class Slot(NamedTuple):
    """What one token leaves in one slot of a block: it depends on the token, on all before it, and on the group's layers."""

    group: int
    position: int
    state: bytes


class _Row:
    """What the worker remembers of one sequence: tokens, the true state after each, block tables, how far it has computed."""

    def __init__(self, new: NewSequence) -> None:
        self.tokens = list(new.token_ids)
        self.states: list[bytes] = []
        self.tables = [list(blocks) for blocks in new.block_ids]
        self.computed_tokens = new.computed_tokens
        self.candidates = -1 if new.sampling is None else new.sampling.num_candidates
        self.is_pooled = new.pooling is not None

    def take_given(self, token_ids: Sequence[int], end: int) -> None:
        """A decoder chose the tokens before `end`."""
        self.tokens[end - len(token_ids):] = token_ids
        del self.states[end - len(token_ids):]


class FakeWorker:
    """Runs steps as `Step` documents them and trusts nothing.

    Args:
        model: gives the tokens.
        groups: KV groups that the model pretends to have; none: it keeps nothing.
        num_blocks: blocks of the simulated cache, the null block included.
        max_num_seqs: sequences that it can remember at once; None sets no bound.
        host_blocks: of the simulated host tier.
    """

    def __init__(self, model: FakeModel, groups: Sequence[KVGroup], num_blocks: int, max_num_seqs: int | None = None,
                 host_blocks: int = 0) -> None:
        self._model = model
        self._groups = tuple(groups)
        self._max_num_seqs = max_num_seqs
        self._block_tokens = groups[0].block_tokens if groups else 1
        self._blocks: list[list[Slot | None]] = [[None] * self._block_tokens for _ in range(num_blocks)]
        self._host: dict[int, list[Slot | None]] = {block: [] for block in range(1, host_blocks + 1)}
        self._rows: dict[int, _Row] = {}
        self._last_step_id = -1
        self._appended: set[int] = set()

    def execute(self, step: Step, fails: Callable[[TokenRange], str | None]) -> StepResult:
        """Apply the step's deltas unless it comes again, then compute its ranges in order.

        Raises:
            KVMismatchError: the step contradicts this worker's state.
        """
        if step.step_id != self._last_step_id:
            self._last_step_id = step.step_id
            self._appended.clear()
            for sequence_id in (*step.finished, *step.preempted):
                self._rows.pop(sequence_id, None)
            self._move(step)
            for new in (*step.new, *step.resumed):
                self._rows[new.sequence_id] = _Row(new)
            for copy in step.copies:
                self._blocks[copy.target] = list(self._blocks[copy.source])
                self._rows[copy.sequence_id].tables[copy.group][-1] = copy.target
        if self._max_num_seqs is not None and len(self._rows) > self._max_num_seqs:
            raise KVMismatchError(f"step {step.step_id} brings {len(self._rows)} sequences, there is room for {self._max_num_seqs}")
        return StepResult(step.step_id, tuple(self._compute(r, fails(r)) for r in step.ranges))

    def _move(self, step: Step) -> None:
        for move in step.swap_out:
            if move.host_block not in self._host or not 0 < move.device_block < len(self._blocks):
                raise KVMismatchError(f"step {step.step_id}: there are no such blocks: {move}")
            self._host[move.host_block] = list(self._blocks[move.device_block])
        for move in step.swap_in:
            if not self._host.get(move.host_block) or move.device_block == 0:
                raise KVMismatchError(f"step {step.step_id}: nothing was moved to the host block of {move}, or it goes nowhere")
            self._blocks[move.device_block] = list(self._host[move.host_block])

    def _compute(self, r: TokenRange, failure: str | None) -> RowResult:
        row = self._rows.get(r.sequence_id)
        if row is None:
            raise KVMismatchError(f"sequence {r.sequence_id} is unknown")
        if r.new_blocks and r.sequence_id not in self._appended:
            self._appended.add(r.sequence_id)
            for table, blocks in zip(row.tables, r.new_blocks, strict=True):
                table.extend(blocks)
        end = r.start + r.num_tokens
        if r.given:
            row.take_given(r.given, end)
        self._check_range(r, row, end)
        self._extend_states(row, end)
        for group, table in zip(self._groups, row.tables, strict=True):
            self._write(group, table, row, r.start, end)
            self._read(group, table, row, r, end)
        row.computed_tokens = end
        if row.is_pooled:
            error = None if failure is None else RowError("InjectedFailure", failure)
            state = row.states[-1]
            return RowResult(r.sequence_id, pooled=Pooled((len(state),), state) if r.sample and error is None else None, error=error)
        if r.sample:  # also when the row fails: steps in flight go on with what is there, nobody will read their results
            row.tokens.append(self._model.next_token(row.states[-1]))
        if failure is not None:
            return RowResult(r.sequence_id, error=RowError("InjectedFailure", failure))
        if r.sample and row.candidates >= 0:
            return RowResult(r.sequence_id, (row.tokens[-1],), (self._model.candidates(row.states[-1], row.candidates),))
        return RowResult(r.sequence_id, (row.tokens[-1],) if r.sample else ())

    def _check_range(self, r: TokenRange, row: _Row, end: int) -> None:
        size = self._block_tokens
        lengths = {len(table) for table in row.tables}
        if r.start != row.computed_tokens:
            raise KVMismatchError(f"{r} starts elsewhere than at the {row.computed_tokens} computed tokens")
        if r.num_tokens < 1 or end > len(row.tokens) or r.sample != (end == len(row.tokens)):
            raise KVMismatchError(f"{r} does not fit the {len(row.tokens)} known tokens")
        if self._groups and lengths != {-(-end // size)}:
            raise KVMismatchError(f"{r} needs {-(-end // size)} blocks of {size} tokens, the tables have {lengths}")

    def _extend_states(self, row: _Row, end: int) -> None:
        """States are recomputed from the tokens, never read from a block: they are the truth that blocks are compared with."""
        while len(row.states) < end:
            previous = row.states[-1] if row.states else b""
            row.states.append(self._model.absorb(previous, row.tokens[len(row.states)]))

    def _write(self, group: KVGroup, table: list[int], row: _Row, start: int, end: int) -> None:
        for position in range(start, end):
            column, offset = divmod(position, group.block_tokens)
            if table[column] == 0:
                raise KVMismatchError(f"position {position} of group {group.index} would be written to the null block")
            self._blocks[table[column]][offset] = Slot(group.index, position, row.states[position])

    def _read(self, group: KVGroup, table: list[int], row: _Row, r: TokenRange, end: int) -> None:
        """Every slot that a token of the range sees holds what this sequence's token left there."""
        first = 0 if group.window_tokens is None else max(0, r.start - group.window_tokens + 1)
        for position in range(first, end):
            column, offset = divmod(position, group.block_tokens)
            block = table[column]
            found, expected = self._blocks[block][offset], Slot(group.index, position, row.states[position])
            if block == 0 or found != expected:
                raise KVMismatchError(f"sequence {r.sequence_id}, group {group.index}, position {position}: block {block} slot "
                                      f"{offset} holds {found}, not {expected}")


class FakeExecutor(Executor):
    """An `Executor` for tests of everything above it: no process, no tensor, no time.

    Steps run when they are collected, in the order in which they were submitted.

    Args:
        groups, num_blocks: the simulated cache; give the scheduler the same.
        model: gives the tokens.
        max_in_flight: how many steps may be submitted before the first is collected.
        max_num_seqs: sequences that the worker can remember; None sets no bound.
        fails_step: asked for each step, also when it comes again for one range; True makes `collect` raise RuntimeError, before the
            step did anything.
        fails_row: asked for each range; a text makes that row an error.
        host_tier: what the worker says of host memory for blocks; give the scheduler the same.
    """

    def __init__(self, groups: Sequence[KVGroup], num_blocks: int, model: FakeModel | None = None, *, max_in_flight: int = 1,
                 max_num_seqs: int | None = None, fails_step: Callable[[Step], bool] = lambda step: False,
                 fails_row: Callable[[TokenRange], str | None] = lambda r: None, host_tier: HostTierReport | None = None) -> None:
        self.max_in_flight = max_in_flight
        self.model = model or FakeModel()
        self.steps: list[Step] = []
        self._fails_step, self._fails_row = fails_step, fails_row
        self._report = WorkerReport(0, tuple(groups), num_blocks, manifest_hash="", host_tier=host_tier)
        self._worker = FakeWorker(self.model, groups, num_blocks, max_num_seqs, host_tier.num_blocks if host_tier else 0)
        self._submitted: deque[Step] = deque()

    def start(self, factory: WorkerFactory, num_workers: int) -> list[WorkerReport]:
        """See `Executor.start`; the factory is not used."""
        return [self._report]

    def allocate(self, num_blocks: int) -> None:
        """See `Executor.allocate`; the cache was made in the constructor."""

    def submit(self, step: Step) -> None:
        """See `Executor.submit`. `steps` keeps every step, for tests to look at."""
        if len(self._submitted) >= self.max_in_flight:
            raise KVMismatchError(f"{self.max_in_flight} steps are in flight already")
        self.steps.append(step)
        self._submitted.append(step)

    def collect(self) -> StepResult:
        """See `Executor.collect`."""
        step = self._submitted.popleft()
        if self._fails_step(step):
            raise RuntimeError(f"step {step.step_id} was made to fail")
        return self._worker.execute(step, self._fails_row)

    def call(self, method: str | Callable[..., Any], timeout_s: float | None = None, args: Sequence[Any] = (),
             kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """See `Executor.call`: there is no model to call.

        Raises:
            UnsupportedFeatureError: always.
        """
        raise UnsupportedFeatureError("call", method, "the fake executor only runs steps")

    def close(self) -> None:
        """See `Executor.close`."""
        self._submitted.clear()
