"""Short ways to make the core's objects in tests."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.core import BranchRule, Engine, Request, RequestSpec, Scheduler, SchedulerLimits
from kvloom.interfaces import Candidates, Decision, KVGroup, SchedulingPolicy, StateKind
from kvloom.params import BeamSearchParams, SamplingParams
from kvloom.testing.fake_model import FakeExecutor, FakeModel
from kvloom_plugins.schedulers.fcfs import FirstComePolicy
from kvloom_samplers.beam_search import BeamSearch


def make_groups(windows: Sequence[int | None], block_tokens: int) -> tuple[KVGroup, ...]:
    """One KV group per entry: None is full attention, a number a window of that many tokens."""
    return tuple(
        KVGroup(i, StateKind.FULL if w is None else StateKind.WINDOW, (i,), block_tokens, w) for i, w in enumerate(windows)
    )


class Harness:
    """A scheduler, a fake executor and an engine over one KV cache."""

    def __init__(self, *, windows: Sequence[int | None] = (None,), block_tokens: int = 4, num_blocks: int = 65,
                 policy: SchedulingPolicy | None = None, max_in_flight: int = 1, model: FakeModel | None = None,
                 observers=(), fails_step=lambda step: False, fails_row=lambda r: None, host_tier=None, **limits) -> None:
        self.limits = SchedulerLimits(**{"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 32} | limits)
        groups = make_groups(windows, block_tokens)
        self.executor = FakeExecutor(groups, num_blocks, model, max_in_flight=max_in_flight, max_num_seqs=self.limits.max_num_seqs,
                                     fails_step=fails_step, fails_row=fails_row, host_tier=host_tier)
        self.model = self.executor.model
        self.scheduler = Scheduler(self.limits, groups, num_blocks, policy or FirstComePolicy(), host_tier)
        self.engine = Engine(self.scheduler, self.executor, observers)

    def add(self, prompt: Sequence[int], max_tokens: int | None = 8, **spec) -> Request:
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=spec.pop("stop_token_ids", None),
                                  ignore_eos=spec.pop("ignore_eos", False))
        return self.engine.add(RequestSpec(tuple(prompt), sampling, eos_token_id=self.model.eos_token_id, **spec))

    def search(self, prompt: Sequence[int], cache_root: bytes = b"", **params) -> tuple[Request, list]:
        """Add a beam search, and what it should find."""
        ends, room = frozenset({self.model.eos_token_id}), self.limits.max_model_len - len(prompt)
        spec = branching_spec(prompt, beam_rule(prompt, ends, room, **params), cache_root=cache_root)
        return self.engine.add(spec), searched(self.model, prompt, beam_rule(prompt, ends, room, **params))

    def step(self) -> list[Request]:
        updated = self.engine.step()
        self.scheduler.check_integrity()
        return updated

    def run(self, max_steps: int = 1000) -> None:
        """Step until nothing is left to do; every block has come back then."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, f"not done after {max_steps} steps"
        assert self.scheduler.num_free_blocks == self.scheduler.num_usable_blocks

    def expected(self, request: Request) -> list[int]:
        """What a plain loop without a cache gives."""
        sampling = request.spec.sampling
        room = self.limits.max_model_len - request.prompt_tokens
        return self.model.generate(request.spec.prompt_token_ids, min(room, sampling.max_tokens or room),
                                   frozenset(sampling.stop_token_ids or ()), ignore_eos=sampling.ignore_eos)

    @property
    def last_step(self):
        return self.executor.steps[-1]


def beam_rule(prompt: Sequence[int], ends: frozenset[int], room_tokens: int, **params) -> BranchRule:
    """A request's rule by the beam search plugin."""
    decoder = BeamSearch()
    state, needs = decoder.start(BeamSearchParams(**{"beam_width": 4, "max_tokens": 8} | params), prompt, ends, room_tokens)

    def decide(candidates: Sequence[Candidates]) -> Decision:
        nonlocal state
        state, decision = decoder.decide(state, candidates)
        return decision

    return BranchRule(needs, decide)


def branching_spec(prompt: Sequence[int], rule: BranchRule, **spec) -> RequestSpec:
    """As the request rules make it."""
    sampling = SamplingParams(temperature=0, max_tokens=rule.needs.max_tokens, logprobs=rule.needs.candidates_per_row, ignore_eos=True)
    return RequestSpec(tuple(prompt), sampling, branching=rule, **spec)


def searched(model: FakeModel, prompt: Sequence[int], rule: BranchRule) -> list[tuple[tuple[int, ...], float]]:
    """Tokens and score of each result, by a plain loop that computes every sequence from its beginning and shares nothing."""
    live, finished = [((), 0.0)], []
    while live:
        asked = []
        for number, (output, total) in enumerate(live):
            state = b""
            for token_id in (*prompt, *output):
                state = model.absorb(state, token_id)
            asked.append(Candidates(number, output, total, model.candidates(state, rule.needs.candidates_per_row)))
        decision = rule.decide(asked)
        finished += [((*live[f.parent][0], *f.token_ids), f.score) for f in decision.finished]
        live = [((*live[b.parent][0], b.token_id), live[b.parent][1] + b.logprob) for b in decision.live]
    return sorted(finished, key=lambda result: -result[1])[:rule.needs.num_results]


def found(request: Request) -> list[tuple[tuple[int, ...], float]]:
    """The same of what the scheduler made."""
    return [(r.token_ids, r.score) for r in request.group.results]
