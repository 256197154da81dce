"""Who computes what next: requests in, `Step`s out; results in, tokens out.

Two verbs move a request's two cursors: `schedule` puts tokens in flight, `commit` takes over what came of them. A step may be
scheduled while earlier ones are in flight. Whatever else ends or delays a request (`finish`, `preempt`, `fail`) takes
effect on its blocks only when no step in flight contains it::

    add -> (HELD) -> WAITING -> schedule -> RUNNING -> commit, finish, fail -> FINISHED
                        ^                     |
                        +---- (DRAINING) <----+  out of blocks, or `preempt`
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType

from kvloom.core.admission import Admission
from kvloom.core.branches import BranchGroups
from kvloom.core.failures import row_failure, step_failure
from kvloom.core.host_tier import HostTier
from kvloom.core.integrity import check_groups, check_queues
from kvloom.core.kv_blocks import KVBlocks
from kvloom.core.limits import SchedulerLimits
from kvloom.core.request import Request, RequestSpec, RequestState
from kvloom.core.request_queue import RequestQueue
from kvloom.core.step_plan import StepPlan, check_result
from kvloom.core.stop import Finish
from kvloom.errors import InternalError, RequestFailedError
from kvloom.interfaces.decoder import Branch
from kvloom.interfaces.scheduling import SchedulingPolicy
from kvloom.interfaces.state import KVGroup
from kvloom.interfaces.step import BlockIds, RowResult, Step, StepResult, TokenRange
from kvloom.interfaces.worker import HostTierReport

NO_CAUSES: Mapping[int, Exception] = MappingProxyType({})


class Scheduler:
    """Continuous batching over one token budget and one pool of KV blocks.

    Args:
        limits: see `SchedulerLimits`.
        groups: KV groups of the model.
        num_blocks: KV blocks that the workers allocated, block 0 (the null block) included.
        policy: orders requests.
        host_tier: what the workers keep on the host of blocks that leave the device.

    Raises:
        UnsupportedFeatureError, ConfigError: KV groups that it cannot serve, or no usable block.
    """

    def __init__(self, limits: SchedulerLimits, groups: tuple[KVGroup, ...], num_blocks: int, policy: SchedulingPolicy,
                 host_tier: HostTierReport | None = None) -> None:
        self._limits = limits
        self._chunked, self._max_chunk_tokens = limits.chunked, limits.max_chunk_tokens
        self._policy = policy
        tier = HostTier.of(host_tier, len(groups), groups[0].block_tokens) if groups and limits.chunkable else None
        self._kv = KVBlocks(groups, num_blocks, cached=limits.cached, tier=tier)
        self._admission = Admission(limits, groups, self._kv)
        self._requests: dict[int, Request] = {}  # all that hold a place or blocks, finished ones in flight included
        self._groups = BranchGroups()
        self._held: dict[int, list[Request]] = {}  # leader -> siblings that wait for its prompt
        self._waiting = RequestQueue()
        self._running = RequestQueue()  # RUNNING and DRAINING: those that the worker knows
        self._leaving: set[int] = set()  # DRAINING or FINISHED in flight: their blocks are about to come back
        self._in_flight: deque[Step] = deque()
        self._next_sequence_id = 0
        self._next_step_id = 0
        self._tell_preempted: list[int] = []
        self._tell_finished: list[int] = []

    # -- what others may ask

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks yet, or gave way."""
        return len(self._waiting) + sum(map(len, self._held.values()))

    @property
    def num_running(self) -> int:
        """Requests that the worker knows."""
        return len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Steps that were scheduled and not committed."""
        return len(self._in_flight)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds; some may still hold cached prefixes."""
        return self._kv.num_free

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that there are, the null block not counted."""
        return self._kv.num_usable

    # -- requests come and go

    def check(self, spec: RequestSpec) -> None:
        """Raises `RequestValidationError` for a request that can never run here."""
        self._admission.check(spec)

    def add(self, spec: RequestSpec) -> Request:
        """Queue a request; its id is larger than all before.

        Raises:
            RequestValidationError: it can never run here; nothing was queued.
        """
        stop = self._admission.check(spec)
        request = Request(self._next_sequence_id, spec, stop, self._kv.new_table())
        self._next_sequence_id += 1
        self._requests[request.sequence_id] = request
        request.order = self._order(request)
        self._groups.add(request)
        leader = self._requests.get(-1 if spec.leader is None else spec.leader)
        if leader is not None and leader.finish is None and not leader.output_tokens:
            request.state = RequestState.HELD
            self._held.setdefault(leader.sequence_id, []).append(request)
        else:
            self._waiting.add(request)
        return request

    def finish(self, sequence_id: int, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request from outside: a stop string ("stop") or its caller ("abort"). Unknown and ended ones are left alone."""
        request = self._requests.get(sequence_id)
        group = self._groups.find(sequence_id, request)
        if group is not None:
            self._groups.end(group, self._end, Finish(reason, stop_reason))
        elif request is not None and request.finish is None:
            self._end(request, Finish(reason, stop_reason))

    def preempt(self, sequence_id: int) -> bool:
        """Make a running request give way, at once or when its steps in flight are committed. False when it is not running."""
        request = self._requests.get(sequence_id)
        if request is None or request.state is not RequestState.RUNNING:
            return False
        self._preempt(request)
        return True

    def forget_prefixes(self) -> bool:
        """Empty the prefix cache. False, and nothing happens, while requests hold blocks."""
        return self._kv.forget_prefixes()

    # -- schedule: the in-flight cursor

    def schedule(self) -> Step | None:
        """The next step: running requests first, in the policy's order, then waiting ones. None when nobody can go on."""
        plan = self._plan()
        # Branches that wait for the rest of their group keep what the rest needs: the newest give way until somebody can go on.
        while not len(plan) and self._groups and not self._in_flight and len(self._running) and self.num_waiting:
            self._preempt(self._running.last)
            plan = self._plan()
        if not len(plan):
            return None
        step = plan.seal(self._next_step_id, self._tell_preempted, self._tell_finished, *self._kv.take_moves())
        self._next_step_id += 1
        self._tell_preempted, self._tell_finished = [], []
        self._in_flight.append(step)
        return step

    def _plan(self) -> StepPlan:
        plan = StepPlan(self._limits.max_num_batched_tokens)
        self._schedule_running(plan)
        if not plan.out_of_blocks:
            self._schedule_waiting(plan)
        return plan

    def _schedule_running(self, plan: StepPlan) -> None:
        for request in self._running:
            if request.state is not RequestState.RUNNING:  # gave way in this very loop, or before
                continue
            num_tokens = self._tokens_within(plan, request.unscheduled_tokens)
            new_blocks: BlockIds = ()
            if num_tokens and request.group is not None and not self._own_last_block(request, plan):
                plan.out_of_blocks = True
                continue
            if num_tokens > request.table.capacity_tokens - request.scheduled_tokens:
                num_tokens = self._make_room(request, num_tokens)
                plan.out_of_blocks |= not num_tokens
                new_blocks = self._kv.extend(request, request.scheduled_tokens + num_tokens)
            if num_tokens and request.is_untold:
                plan.introduce(request, num_tokens)
            elif num_tokens:
                plan.add(request, num_tokens, new_blocks)

    def _schedule_waiting(self, plan: StepPlan) -> None:
        """Strictly in order: when the first cannot start, nobody behind it does."""
        now_s = time.monotonic()
        while len(self._waiting) and self._has_place_for(self._waiting.first):
            request = self._waiting.first
            hit = self._kv.find_hit(request)
            num_tokens = self._tokens_within(plan, len(request.token_ids) - hit.tokens)
            if not num_tokens or not self._kv.has_room_for(request, hit, chunked=self._chunked):
                return
            self._waiting.remove(request)
            self._kv.take_hit(request, hit)
            request.start(hit.tokens, now_s)
            self._running.add(request)
            num_tokens = min(num_tokens, self._kv.tokens_that_fit(request))
            self._kv.extend(request, request.scheduled_tokens + num_tokens)
            plan.introduce(request, num_tokens)

    def _has_place_for(self, request: Request) -> bool:
        kept = sum(group.places_kept_from(request) for group in self._groups)
        return len(self._running) + kept + (request.group is None) <= self._limits.max_num_seqs

    def _tokens_within(self, plan: StepPlan, num_tokens: int) -> int:
        """How many of the tokens that a request could compute this step may take; a prompt that may not be cut is all or nothing."""
        allowed = plan.budget_tokens if plan.budget_tokens < self._max_chunk_tokens else self._max_chunk_tokens
        if num_tokens <= allowed:
            return num_tokens
        return allowed if self._chunked else 0

    def _make_room(self, request: Request, num_tokens: int) -> int:
        """How many of `num_tokens` can have blocks. Others give way only when that would be none."""
        while True:
            fit = self._kv.tokens_that_fit(request)
            if fit >= num_tokens:
                return num_tokens
            if fit > 0 and self._chunked:
                return fit
            if not self._push_out(request):
                return 0

    def _own_last_block(self, request: Request, plan: StepPlan) -> bool:
        """See to it that a branch writes its next token into a block that no other one holds. False when no block is left."""
        while shared := self._kv.shared_ahead(request):
            if len(shared) <= self._kv.num_free:
                plan.copies += self._kv.make_private(request, shared)
            elif not self._push_out(request):
                return False
        return True

    def _push_out(self, request: Request) -> bool:
        """Let the newest request give way to `request`. False when that would be itself, or blocks are about to come back anyway."""
        if self._leaving or self._running.last is request:
            return False
        self._preempt(self._running.last)
        return True

    # -- commit: the committed cursor

    def commit(self, step: Step, result: StepResult, causes: Mapping[int, Exception] = NO_CAUSES) -> list[Request]:
        """Take over a step's results; the oldest step first. Returns the requests that got tokens or ended.

        Args:
            causes: sequence id -> what a row's error came from, for errors of this process.

        Raises:
            InternalError: `step` is not the oldest in flight, or `result` is not its result; nothing was changed.
        """
        check_result(step, result)
        if self._in_flight and self._in_flight[0].step_id != step.step_id:
            raise InternalError(f"step {step.step_id} is committed before step {self._in_flight[0].step_id}")
        # A step of which nothing succeeded may not even have moved its blocks.
        self._land(step, done=any(row.error is None for row in result.rows))
        now_s = time.monotonic()
        updated = []
        for done, row in zip(step.ranges, result.rows, strict=True):
            request = self._requests[done.sequence_id]
            request.landed(done)
            if request.finish is None and self._take_over(request, done, row, now_s, causes.get(done.sequence_id)):
                updated.append(request if request.group is None else request.group.root)
            if request.sequence_id in self._leaving and not request.in_flight:
                self._leave(request)
        return updated

    def _take_over(self, request: Request, done: TokenRange, row: RowResult, now_s: float, cause: Exception | None) -> bool:
        """Apply one row to a live request; True when it got tokens or ended. Of a branching one: when all of it ended."""
        if row.error is not None:
            self._fail(request, row_failure(row.error, cause))
            return True
        finish = request.commit(done, row, now_s)
        self._kv.settle(request)
        if request.group is not None:
            self._groups.decide(request.group, self._end, self._fork)
            return not self._groups.lives(request.group)
        if done.sample:
            self._release(request)
        if finish is not None:
            self._end(request, finish)
        return done.sample

    def fail(self, step: Step, error: BaseException) -> list[Request]:
        """A step in flight raised: its live requests end with reason "error". Returns them.

        Raises:
            InternalError: `step` is not in flight.
        """
        self._land(step, done=False)
        failed = []
        for done in step.ranges:
            request = self._requests[done.sequence_id]
            request.landed(done)
            if request.finish is None:
                self._fail(request, step_failure(step, error))
                failed.append(request if request.group is None else request.group.root)
            if request.sequence_id in self._leaving and not request.in_flight:
                self._leave(request)
        # The worker may not have heard who left. Forgetting twice does no harm, forgetting a resumed one would.
        running = {r.sequence_id for r in self._running}
        self._tell_preempted += [i for i in step.preempted if i not in running]
        self._tell_finished += step.finished
        return failed

    def _land(self, step: Step, *, done: bool) -> None:
        for place, in_flight in enumerate(self._in_flight):
            if in_flight.step_id == step.step_id:
                del self._in_flight[place]
                self._kv.landed(step, done=done)
                return
        raise InternalError(f"step {step.step_id} is not in flight")

    # -- transitions

    def _order(self, request: Request) -> tuple[float, ...]:
        if request.group is None:
            return (*self._policy.sort_key(request), request.sequence_id)
        root = request.group.root  # branches stay together
        return (*self._policy.sort_key(root), root.sequence_id, request.sequence_id)

    def _release(self, leader: Request) -> None:
        """Its prompt is computed, or it ended: siblings wait for nobody any more."""
        for request in self._held.pop(leader.sequence_id, ()):
            request.state = RequestState.WAITING
            self._waiting.add(request)

    def _preempt(self, request: Request) -> None:
        if request.in_flight:
            request.state = RequestState.DRAINING
            self._leaving.add(request.sequence_id)
            return
        self._running.remove(request)
        self._kv.set_aside(request)
        request.give_way()
        self._tell_preempted.append(request.sequence_id)
        request.order = self._order(request)
        self._waiting.add(request)

    def _end(self, request: Request, finish: Finish, error: RequestFailedError | None = None) -> None:
        if request.state is RequestState.HELD:
            self._forget_held(request)
        elif request.state is RequestState.WAITING:
            self._waiting.remove(request)
        else:
            self._running.remove(request)
            self._tell_finished.append(request.sequence_id)
        request.state, request.finish, request.error = RequestState.FINISHED, finish, error
        request.metrics.finished_time = time.monotonic()
        self._release(request)
        self._leaving.add(request.sequence_id)
        if not request.in_flight:
            self._leave(request)

    def _fail(self, request: Request, error: RequestFailedError) -> None:
        if request.group is None:
            self._end(request, Finish("error"), error)
        else:
            self._groups.end(request.group, self._end, Finish("error"), error)

    def _fork(self, parent: Request, branch: Branch) -> Request:
        fork = parent.fork(self._next_sequence_id, self._kv.fork(parent.table), branch)
        self._next_sequence_id += 1
        self._requests[fork.sequence_id] = fork
        fork.order = self._order(fork)
        self._running.add(fork)
        return fork

    def _forget_held(self, request: Request) -> None:
        leader = next(i for i, held in self._held.items() if request in held)
        self._held[leader].remove(request)
        if not self._held[leader]:
            del self._held[leader]

    def _leave(self, request: Request) -> None:
        """Nothing of it is in flight any more: its blocks come back."""
        self._leaving.remove(request.sequence_id)
        if request.state is RequestState.DRAINING:
            self._preempt(request)
        else:
            self._kv.free(request)
            del self._requests[request.sequence_id]

    # -- invariants

    def check_integrity(self) -> None:
        """Queues, states, cursors, steps in flight and blocks agree. O(pool + blocks held): for tests, and for an idle engine.

        Raises:
            InternalError: they do not; that is a bug.
        """
        self._kv.check_integrity(self._requests.values(), self._in_flight)
        check_queues(self._requests, self._held, self._waiting, self._running, self._leaving, self._in_flight)
        check_groups(self._groups, self._requests)
