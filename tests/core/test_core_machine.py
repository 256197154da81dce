"""Random arrivals, lengths, shared prefixes, forks, aborts, preemptions and failures against tiny pools of several KV groups, or none.

After every rule the scheduler's invariants hold. At the end every request that was let through has exactly the tokens that a
plain loop without a cache gives it, and every block has come back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from core_helpers import beam_rule, branching_spec, found, make_groups, searched
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvloom.core import Finish, Request, RequestSpec, Scheduler, SchedulerLimits
from kvloom.core.wire import from_wire, to_wire
from kvloom.errors import RequestValidationError
from kvloom.interfaces import HostTierReport, Step
from kvloom.params import PoolingParams, SamplingParams
from kvloom.testing.fake_model import FakeExecutor, FakeModel, KVMismatchError
from kvloom_plugins.schedulers.fcfs import FirstComePolicy
from kvloom_plugins.schedulers.priority import PriorityPolicy

EOS, STOP = 3, 7
WINDOWS = [(None,), (5,), (None, 6), (3, 9), (None, 1), (4, None, 11), ()]


class CoreMachine(RuleBasedStateMachine):
    """Steps are scheduled up to `depth` ahead and committed in order, at any later time."""

    @initialize(
        windows=st.sampled_from(WINDOWS), block_tokens=st.integers(1, 5),
        pool=st.sampled_from([0.6, 1, 1.3, 2]), depth=st.integers(1, 3),
        max_num_seqs=st.integers(1, 6), budget=st.integers(1, 40), threshold=st.sampled_from([0, 1, 3, 8]),
        chunked=st.sampled_from([True, True, False]),
        cached=st.sampled_from([True, True, False]), max_model_len=st.integers(2, 60),
        policy=st.sampled_from([FirstComePolicy, PriorityPolicy]), failures=st.booleans(),
        host_blocks=st.sampled_from([0, 0, 2, 7, 40]), tokens_per_s=st.sampled_from([0.5, 2.0]),
    )
    def start(self, windows, block_tokens, pool, depth, max_num_seqs, budget, threshold, chunked, cached, max_model_len,
              policy, failures, host_blocks, tokens_per_s):
        groups = make_groups(windows, block_tokens)
        # What one request of the greatest length takes, times `pool`: so several that run together run out of blocks.
        columns = -(-(max_model_len - 1) // block_tokens)
        reaches = [columns if w is None or not chunked else -(-(w - 1) // block_tokens) + 1 for w in windows]
        num_blocks = max(2, int(pool * sum(min(columns, reach) for reach in reaches)) + 1) if groups else 0
        chunked = chunked and bool(groups)  # a model that keeps nothing computes a prompt in one step
        self.limits = SchedulerLimits(
            max_model_len, max_num_seqs, budget if chunked else max(budget, max_model_len), threshold, chunked, cached,
            chunkable=bool(groups),
        )
        tier = HostTierReport(host_blocks, block_bytes=1, bytes_per_s=2.0, tokens_per_s=tokens_per_s) if host_blocks else None
        self.model = FakeModel(vocab_size=97, eos_token_id=EOS, eos_every=11)
        self.failures = failures
        self.failing: set[int] = set()
        self.failing_rows: set[int] = set()
        self.executor = FakeExecutor(
            groups, num_blocks, self.model, max_in_flight=depth, max_num_seqs=max_num_seqs,
            fails_step=lambda step: step.step_id in self.failing,
            fails_row=lambda r: "row failure" if r.sequence_id in self.failing_rows else None, host_tier=tier,
        )
        self.scheduler = Scheduler(self.limits, groups, num_blocks, policy(), tier)
        self.depth = depth
        self.requests: list[Request] = []
        self.to_find: dict[int, list] = {}  # what branching requests should find
        self.in_flight: deque[Step] = deque()
        self.tainted: set[int] = set()  # in flight when an earlier step failed: the worker may not be able to run them

    # -- rules

    @rule(prompts=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 2)), min_size=1, max_size=4),
          max_tokens=st.one_of(st.none(), st.integers(1, 20)), priority=st.integers(-1, 1), salt=st.sampled_from([b"", b"", b"x"]),
          reads=st.sampled_from([True, True, True, False]), ignore_eos=st.booleans(), n=st.sampled_from([1, 1, 2, 4, 0]))
    def arrive(self, prompts, max_tokens, priority, salt, reads, ignore_eos, n):
        """With n = 0 they are to be pooled."""
        for first, length, own in prompts:
            # Blocks of equal tokens after different beginnings, and prompts that are beginnings of others.
            prompt = (first, *(position % 3 for position in range(length)), *range(10, 10 + own))
            pooling = None if n else PoolingParams()
            sampling = SamplingParams(n=n, max_tokens=max_tokens, stop_token_ids=[STOP], ignore_eos=ignore_eos) if n else None
            spec = RequestSpec(prompt, sampling, priority, eos_token_id=EOS, cache_root=salt, read_prefix_cache=reads, pooling=pooling)
            try:
                leader = self.scheduler.add(spec)
            except RequestValidationError as error:
                assert error.parameter in ("prompt_token_ids", "max_tokens")  # noqa: PT017
                continue
            siblings = [replace(spec, sample_index=i, leader=leader.sequence_id, read_prefix_cache=True) for i in range(1, n)]
            self.requests += [leader, *map(self.scheduler.add, siblings)]

    @rule(first=st.integers(0, 2), length=st.integers(0, 20), width=st.integers(1, 4), max_tokens=st.integers(1, 12),
          priority=st.integers(-1, 1), salt=st.sampled_from([b"", b"x"]), ignore_eos=st.booleans(), penalty=st.sampled_from([0.0, 1.0, -0.5]))
    def arrive_branching(self, first, length, width, max_tokens, priority, salt, ignore_eos, penalty):
        prompt = (first, *(position % 3 for position in range(length)))
        if len(prompt) >= self.limits.max_model_len:
            return

        def made():
            return beam_rule(prompt, frozenset({EOS}), self.limits.max_model_len - len(prompt), beam_width=width, max_tokens=max_tokens,
                             ignore_eos=ignore_eos, length_penalty=penalty)

        try:
            request = self.scheduler.add(branching_spec(prompt, made(), priority=priority, cache_root=salt))
        except RequestValidationError as error:
            assert error.parameter in ("beam_width", "max_tokens")  # noqa: PT017
            return
        self.requests.append(request)
        self.to_find[request.sequence_id] = searched(self.model, prompt, made())

    @rule(rounds=st.integers(1, 10))
    def run(self, rounds):
        """Keep `depth` steps in flight."""
        while rounds and self.advance():
            rounds -= 1

    @precondition(lambda self: len(self.in_flight) < self.depth)
    @rule()
    def schedule_ahead(self):
        self.schedule()

    def schedule(self) -> bool:
        step = self.scheduler.schedule()
        if step is None:
            return False
        self.check_step(step)
        travelled = from_wire(to_wire(step))
        assert travelled == step
        self.executor.submit(travelled)
        self.in_flight.append(step)
        return True

    @precondition(lambda self: self.in_flight)
    @rule()
    def commit(self):
        step = self.in_flight.popleft()
        try:
            result = self.executor.collect()
        except RuntimeError as error:
            self.tainted |= {s.step_id for s in self.in_flight}
            self.scheduler.fail(step, error)
        except KVMismatchError as error:
            assert step.step_id in self.tainted
            self.tainted |= {s.step_id for s in self.in_flight}
            self.scheduler.fail(step, error)
        else:
            self.scheduler.commit(step, result)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), reason=st.sampled_from(["abort", "stop"]))
    def finish_from_outside(self, data, reason):
        self.scheduler.finish(data.draw(st.sampled_from(self.requests)).sequence_id, reason, "END" if reason == "stop" else None)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def preempt(self, data):
        request = data.draw(st.sampled_from(self.requests))
        if request.group is not None and request.group.branches:
            request = data.draw(st.sampled_from(request.group.branches))
        self.scheduler.preempt(request.sequence_id)

    @precondition(lambda self: self.failures and self.in_flight)
    @rule(data=st.data())
    def make_a_step_fail(self, data):
        self.failing.add(data.draw(st.sampled_from([s.step_id for s in self.in_flight])))

    @precondition(lambda self: self.failures and self.requests)
    @rule(data=st.data())
    def make_a_row_fail(self, data):
        self.failing_rows.add(data.draw(st.sampled_from(self.requests)).sequence_id)

    @precondition(lambda self: self.failures)
    @rule()
    def forget_prefixes(self):
        self.scheduler.forget_prefixes()

    # -- what holds

    @invariant()
    def adds_up(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        rounds = (self.depth + 3) * (sum(r.stop.end_tokens * r.spec.max_branches for r in self.requests) + 10)
        while self.scheduler.num_running or self.scheduler.num_waiting or self.in_flight:
            rounds -= 1
            assert rounds > 0, "no progress"
            assert self.advance(), "nobody can go on"
        assert self.scheduler.num_free_blocks == self.scheduler.num_usable_blocks
        for request in self.requests:
            self.check_outcome(request)

    def advance(self) -> bool:
        """Schedule as far ahead as allowed, commit one step. False when there is nothing to do."""
        while len(self.in_flight) < self.depth and self.schedule():
            self.adds_up()
        if not self.in_flight:
            return False
        self.commit()
        self.adds_up()
        return True

    def check_step(self, step: Step):
        assert 0 < step.num_tokens <= self.limits.max_num_batched_tokens
        assert len(step.ranges) <= self.limits.max_num_seqs
        ends = {r.sequence_id: r.stop.end_tokens for r in self.requests}
        for r in step.ranges:
            assert r.start + r.num_tokens < ends.get(r.sequence_id, self.limits.max_model_len), "the last token that a request may have is never computed"
            assert r.num_tokens <= self.limits.max_chunk_tokens

    def check_outcome(self, request: Request):
        assert request.finish is not None
        if request.spec.sampling is None:
            assert (request.pooled is None) == (request.finish != Finish("stop"))
            assert request.pooled in (None, self.model.pooled(request.spec.prompt_token_ids))
            assert not request.output_tokens
            return
        if request.group is not None:
            assert not request.group.branches
            assert (request.error is not None) == (request.finish.reason == "error")
            if request.finish.reason not in ("error", "abort") and request.finish.stop_reason != "END":
                assert found(request) == self.to_find[request.sequence_id]
            return
        expected = self.expected(request)
        if request.finish.reason == "error":
            assert request.error is not None
        elif request.finish.reason != "abort" and request.finish.stop_reason != "END":
            assert request.output_token_ids == expected
            assert request.finish == self.expected_finish(request, expected[-1])
        assert request.output_token_ids == expected[: request.output_tokens]
        assert (request.metrics.first_token_time is not None) == (request.output_tokens > 0)

    def expected(self, request: Request) -> list[int]:
        sampling, room = request.spec.sampling, self.limits.max_model_len - request.prompt_tokens
        return self.model.generate(request.spec.prompt_token_ids, min(room, sampling.max_tokens or room), frozenset({STOP}),
                                   ignore_eos=sampling.ignore_eos)

    @staticmethod
    def expected_finish(request: Request, last_token: int) -> Finish:
        if last_token == EOS and not request.spec.sampling.ignore_eos:
            return Finish("stop")
        return Finish("stop", STOP) if last_token == STOP else Finish("length")


TestCoreMachine = CoreMachine.TestCase
TestCoreMachine.settings = settings(
    max_examples=max(100, settings().max_examples), stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
