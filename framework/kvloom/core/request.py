"""One sequence from arrival to end: its tokens, its two cursors, its state, its metrics.

    tokens     0 ......... computed ......... scheduled ......... len(token_ids)
               in the cache | steps in flight   | not asked for yet

With work in flight `scheduled_tokens` may be one past the tokens that are known here: the worker already holds the token
that a step in flight sampled. Only the scheduler changes a request.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kvloom.core.branches import BranchGroup, BranchRule
from kvloom.core.kv_blocks import BlockTable
from kvloom.core.stop import Finish, StopRule
from kvloom.errors import InternalError, RequestFailedError
from kvloom.interfaces.decoder import Branch
from kvloom.interfaces.grammar import GrammarSpec
from kvloom.interfaces.step import BlockIds, NewSequence, Pooled, RowResult, TokenLogprob, TokenRange
from kvloom.outputs import RequestMetrics
from kvloom.params import PoolingParams, SamplingParams


class RequestState(Enum):
    """Where a request is. (HELD ->) WAITING -> RUNNING -> FINISHED; a preemption leads back to WAITING, through DRAINING while steps
    that contain the request are in flight. HELD waits for its leader's prompt. FINISHED can be reached from everywhere."""

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    DRAINING = "draining"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """What a caller wants computed: one sequence (n siblings are n of these), to be continued or to be pooled.

    Args:
        prompt_token_ids: checked against the vocabulary by the caller; not empty.
        sampling: the engine's own copy: nobody may change it afterwards; None for a sequence that is pooled.
        priority: lower is served earlier by the priority policy.
        eos_token_id: end-of-text token; ends the output without a stop reason.
        extra_eos_token_ids: further end tokens (generation_config); the token is the stop reason.
        seed: key of the counter-based generator, 64 bit.
        sample_index: 0..n-1 within the caller's request.
        cache_root: digest of everything besides tokens that decides what is in the blocks, see `prefix_cache.root_digest`.
        read_prefix_cache: False computes every prompt token (its blocks still serve others).
        leader: sequence id of the sibling whose prompt it shares: it waits until that one's is computed. None: it is the leader.
        processors, grammar, adapter, media, extras: as `NewSequence` says.
        branching: set for a request whose sequences branch; `sampling` then says how many candidates a row gives.
        pooling: like `sampling`, of a sequence that ends when its prompt is computed.
        arrival_s: ``time.monotonic()`` of the arrival; None means now.
    """

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams | None
    priority: int = 0
    eos_token_id: int | None = None
    extra_eos_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    sample_index: int = 0
    cache_root: bytes = b""
    read_prefix_cache: bool = True
    leader: int | None = None
    processors: tuple[tuple[str, Any], ...] = ()
    grammar: GrammarSpec | None = None
    adapter: str | None = None
    media: tuple[tuple[str, int], ...] = ()
    extras: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    branching: BranchRule | None = None
    arrival_s: float | None = None
    pooling: PoolingParams | None = None

    @property
    def generation(self) -> SamplingParams:
        """`sampling` of a sequence that is continued. Raises `InternalError` for one that is pooled."""
        if self.sampling is None:
            raise InternalError("a pooling request was taken for one that generates")
        return self.sampling

    @property
    def shares_prompt(self) -> bool:
        """Whether siblings look for its prompt's blocks, also where nothing is kept for other requests."""
        return (self.sampling is not None and self.sampling.num_sequences > 1) or self.max_branches > 1

    @property
    def max_branches(self) -> int:
        """Sequences that it may keep at a time."""
        return 1 if self.branching is None else self.branching.needs.max_branches

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text, whether or not this request heeds it."""
        return (*(() if self.eos_token_id is None else (self.eos_token_id,)), *sorted(self.extra_eos_token_ids))


class Request:
    """One sequence in the scheduler; satisfies `RequestView`. Read it, never write it.

    Attributes:
        spec: what was asked for.
        stop: when it ends.
        state: see `RequestState`.
        token_ids: prompt and committed output.
        computed_tokens: committed cursor: their state is in the cache.
        scheduled_tokens: in-flight cursor: they were given to a step.
        lost_tokens: how many were computed when it last gave way.
        in_flight, in_flight_samples: steps not committed yet that contain it, and how many of them sample a token.
        logprobs: candidates of each output token, empty unless asked for.
        prompt_logprobs: the same for prompt tokens; the first has none.
        pooled: what a pooling request asked for.
        table: its blocks.
        digests: prefix-cache digests of its full blocks, as far as they were needed.
        order: its place in the scheduler, smaller is served earlier.
        group: the branches that it is one of, if it branches.
        candidates: of a branch: best next tokens, until its group decides; empty before.
        cumulative_logprob: of a branch: of its output tokens.
        is_untold: a fork that no step has introduced to the worker.
        finish: why it ended, None while it runs.
        error: with ``finish.reason == "error"``: what went wrong; ``__cause__`` is the original exception, if there is one.
        metrics: see `RequestMetrics`.
    """

    __slots__ = (
        "arrival_s", "candidates", "computed_tokens", "cumulative_logprob", "digests", "error", "finish", "group", "in_flight",
        "in_flight_samples", "is_untold", "logprobs", "lost_tokens", "metrics", "order", "pooled", "priority", "prompt_logprobs",
        "prompt_tokens", "scheduled_tokens", "sequence_id", "spec", "state", "stop", "table", "token_ids",
    )

    def __init__(self, sequence_id: int, spec: RequestSpec, stop: StopRule, table: BlockTable) -> None:
        self.sequence_id = sequence_id
        self.spec = spec
        self.stop = stop
        self.table = table
        self.priority = spec.priority
        self.arrival_s = time.monotonic() if spec.arrival_s is None else spec.arrival_s
        self.prompt_tokens = len(spec.prompt_token_ids)
        self.token_ids = list(spec.prompt_token_ids)
        self.logprobs: list[tuple[TokenLogprob, ...]] = []
        self.prompt_logprobs: list[tuple[TokenLogprob, ...]] = []
        self.pooled: Pooled | None = None
        self.digests: list[bytes] = []
        self.state = RequestState.WAITING
        self.order: tuple[float, ...] = ()
        self.computed_tokens = self.scheduled_tokens = 0
        self.lost_tokens = 0
        self.in_flight = self.in_flight_samples = 0
        self.group = None if spec.branching is None else BranchGroup(self, spec.branching)
        self.candidates: tuple[TokenLogprob, ...] = ()
        self.cumulative_logprob = 0.0
        self.is_untold = False
        self.finish: Finish | None = None
        self.error: RequestFailedError | None = None
        self.metrics = RequestMetrics(self.arrival_s)

    @property
    def output_tokens(self) -> int:
        """Tokens generated and committed so far."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens, a copy."""
        return self.token_ids[self.prompt_tokens:]

    @property
    def has_place(self) -> bool:
        """Whether it takes one of the places on the worker."""
        return self.state in (RequestState.RUNNING, RequestState.DRAINING)

    @property
    def num_preemptions(self) -> int:
        """How often it had to give way."""
        return self.metrics.num_preemptions

    @property
    def unscheduled_tokens(self) -> int:
        """Tokens that a step could compute now, those that a step in flight is about to sample included."""
        if self.group is not None:  # what comes after its tokens, others decide
            return len(self.token_ids) - self.scheduled_tokens
        end = len(self.token_ids) + self.in_flight_samples
        # The last token that the sequence may have is never computed: nothing comes after it.
        return end - self.scheduled_tokens if end < self.stop.end_tokens else 0

    def schedule(self, num_tokens: int, new_blocks: BlockIds = ()) -> TokenRange:
        """Put the next `num_tokens` tokens in flight."""
        start, known = self.scheduled_tokens, len(self.token_ids)
        end = start + num_tokens
        sample = end == known + self.in_flight_samples
        self.scheduled_tokens = end
        self.in_flight += 1
        self.in_flight_samples += sample
        if self.group is not None:
            return TokenRange(self.sequence_id, start, num_tokens, new_blocks, sample, given=(self.token_ids[-1],) if sample else ())
        return TokenRange(self.sequence_id, start, num_tokens, new_blocks, sample, end - known if end > known else 0)

    def landed(self, done: TokenRange) -> None:
        """A step that contained this range is over, whatever came of it."""
        self.in_flight -= 1
        self.in_flight_samples -= done.sample

    def commit(self, done: TokenRange, row: RowResult, now_s: float) -> Finish | None:
        """Take over what a range produced; returns why the sequence ends, or None."""
        self.computed_tokens = done.start + done.num_tokens
        if row.prompt_logprobs:  # those of tokens that are computed again after a preemption come again
            self.prompt_logprobs[done.start:] = row.prompt_logprobs
        if row.pooled is not None:
            self.pooled = row.pooled
            return Finish("stop")
        if not row.token_ids:
            return None
        metrics = self.metrics
        metrics.last_token_time = now_s
        if metrics.first_token_time is None:
            metrics.first_token_time = now_s
        if self.group is not None:
            self.candidates = row.logprobs[0] if row.logprobs else ()
            return None
        for place, token_id in enumerate(row.token_ids):
            self.token_ids.append(token_id)
            metrics.num_generation_tokens += 1
            if row.logprobs:
                self.logprobs.append(row.logprobs[place])
            finish = self.stop.check(token_id, len(self.token_ids))
            if finish is not None:
                return finish
        return None

    def go_on(self, branch: Branch) -> None:
        """Its group decided: it gets this token."""
        self.token_ids.append(branch.token_id)
        self.logprobs.append(self.candidates)
        self.cumulative_logprob += branch.logprob
        self.candidates = ()

    def fork(self, sequence_id: int, table: BlockTable, branch: Branch) -> Request:
        """A further sequence with its tokens and this one after them; `table` shares its blocks. Call it before `go_on`."""
        fork = Request(sequence_id, self.spec, self.stop, table)
        fork.group, fork.metrics, fork.arrival_s = self.group, self.metrics, self.arrival_s
        fork.token_ids, fork.logprobs, fork.digests = list(self.token_ids), list(self.logprobs), list(self.digests)
        fork.candidates, fork.cumulative_logprob = self.candidates, self.cumulative_logprob
        fork.computed_tokens = fork.scheduled_tokens = self.computed_tokens
        fork.state, fork.is_untold = RequestState.RUNNING, True
        fork.go_on(branch)
        return fork

    def start(self, cached_tokens: int, now_s: float) -> None:
        """It leaves the queue, with the state of `cached_tokens` tokens taken from the prefix cache."""
        metrics = self.metrics
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = now_s
            metrics.time_in_queue = now_s - metrics.arrival_time
            metrics.num_cached_tokens = cached_tokens
        metrics.num_recomputed_tokens += max(0, self.lost_tokens - cached_tokens)
        self.computed_tokens = self.scheduled_tokens = cached_tokens
        self.state = RequestState.RUNNING

    def give_way(self) -> None:
        """It was preempted: its tokens stay, their state is lost, and it waits again."""
        self.metrics.num_preemptions += 1
        self.lost_tokens = self.computed_tokens
        self.computed_tokens = self.scheduled_tokens = 0
        self.candidates, self.is_untold = (), False  # its last token is computed again, so the candidates come again
        self.state = RequestState.WAITING

    def as_new_sequence(self) -> NewSequence:
        """Everything that a worker which does not know the sequence needs."""
        spec = self.spec
        return NewSequence(
            self.sequence_id, tuple(self.token_ids), self.prompt_tokens, self.computed_tokens, self.table.ids(), spec.sampling,
            spec.pooling, spec.seed, sample_index=spec.sample_index, adapter=spec.adapter, media=spec.media, extras=dict(spec.extras),
            end_token_ids=spec.end_token_ids, processors=spec.processors, grammar=spec.grammar,
            score_temperature=0.0 if spec.branching is None else spec.branching.needs.temperature,
        )

    def check_integrity(self) -> None:
        """The cursors agree with each other, with the tokens and with the state.

        Raises:
            InternalError: they do not.
        """
        ended = self.state is RequestState.FINISHED  # what its steps in flight compute is not taken over any more
        if not (
            0 <= self.computed_tokens <= self.scheduled_tokens <= self.table.capacity_tokens
            and (ended or self.scheduled_tokens < len(self.token_ids) + (self.in_flight_samples or bool(self.candidates)))
            and len(self.token_ids) <= self.stop.end_tokens
            and 0 <= self.in_flight_samples <= self.in_flight
            and (self.in_flight > 0 or self.computed_tokens == self.scheduled_tokens)
            and (self.in_flight > 0 or self.state in (RequestState.HELD, RequestState.WAITING, RequestState.RUNNING))
            and (self.state not in (RequestState.HELD, RequestState.WAITING) or self.table.capacity_tokens == 0)
            and ended == (self.finish is not None)
        ):
            raise InternalError(
                f"sequence {self.sequence_id} is {self.state.value} with tokens computed {self.computed_tokens}, scheduled "
                f"{self.scheduled_tokens}, known {len(self.token_ids)}, room {self.table.capacity_tokens}; in flight "
                f"{self.in_flight} steps, {self.in_flight_samples} samples"
            )
