"""Short ways to make the core's objects in tests."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.core import Engine, Request, RequestSpec, Scheduler, SchedulerLimits
from kvloom.interfaces import KVGroup, SchedulingPolicy, StateKind
from kvloom.params import SamplingParams
from kvloom.testing.fake_model import FakeExecutor, FakeModel
from kvloom_plugins.schedulers.fcfs import FirstComePolicy


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
