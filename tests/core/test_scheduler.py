"""The scheduler's single decisions; what holds over all of them is in test_core_machine."""

from __future__ import annotations

import pytest
from core_helpers import Harness

from kvloom.core import RequestSpec
from kvloom.core.wire import from_wire, to_wire
from kvloom.errors import ConfigError, InternalError, RequestValidationError, UnsupportedFeatureError
from kvloom.interfaces import Pooled, RowError, RowResult, StepResult, TokenLogprob
from kvloom.params import PoolingParams, SamplingParams
from kvloom_plugins.schedulers.priority import PriorityPolicy


def test_one_budget_serves_decodes_first_then_prompts_in_chunks() -> None:
    h = Harness(max_num_batched_tokens=10, max_num_seqs=4)
    first = h.add(range(6))
    h.step()
    h.add(range(100, 120))
    h.step()
    ranges = h.last_step.ranges
    assert [(r.sequence_id, r.start, r.num_tokens, r.sample) for r in ranges] == [(0, 6, 1, True), (1, 0, 9, False)]
    h.run()
    assert first.output_token_ids == h.expected(first)


def test_one_request_gets_at_most_the_threshold_in_a_step() -> None:
    h = Harness(long_prefill_token_threshold=5)
    h.add(range(12))
    h.step()
    assert [r.num_tokens for r in h.last_step.ranges] == [5]


def test_prompts_that_may_not_be_cut_wait_for_a_whole_budget() -> None:
    h = Harness(enable_chunked_prefill=False, max_num_batched_tokens=128, max_model_len=128)
    h.add(range(100))
    h.add(range(200, 250))
    h.step()
    assert [r.num_tokens for r in h.last_step.ranges] == [100]
    h.step()
    assert [r.num_tokens for r in h.last_step.ranges] == [1, 50]


def test_no_more_than_max_num_seqs_run() -> None:
    h = Harness(max_num_seqs=2)
    for i in range(5):
        h.add([i])
    h.step()
    assert (h.scheduler.num_running, h.scheduler.num_waiting) == (2, 3)
    h.run()


def test_the_newest_gives_way_when_blocks_run_out_and_its_tokens_are_kept() -> None:
    h = Harness(num_blocks=9, max_num_batched_tokens=64)
    old, new = h.add(range(12), max_tokens=20), h.add(range(50, 60), max_tokens=20)
    h.run()
    assert (old.metrics.num_preemptions, new.metrics.num_preemptions > 0) == (0, True)
    assert new.metrics.num_recomputed_tokens >= 0
    for request in (old, new):
        assert request.output_token_ids == h.expected(request)


def test_the_largest_priority_number_gives_way() -> None:
    h = Harness(num_blocks=9, policy=PriorityPolicy(), max_num_batched_tokens=64)
    unimportant, important = h.add(range(12), max_tokens=20, priority=5), h.add(range(50, 60), max_tokens=20, priority=1)
    h.run()
    assert (unimportant.metrics.num_preemptions > 0, important.metrics.num_preemptions) == (True, 0)


def test_a_given_request_can_be_made_to_give_way() -> None:
    h = Harness()
    requests = [h.add([i, i + 1]) for i in range(3)]
    h.step()
    assert h.scheduler.preempt(1)
    assert not h.scheduler.preempt(1)
    assert not h.scheduler.preempt(99)
    h.run()
    assert [r.metrics.num_preemptions for r in requests] == [0, 1, 0]
    assert all(r.output_token_ids == h.expected(r) for r in requests)


def test_full_blocks_are_found_by_later_prompts_but_the_last_token_is_computed() -> None:
    h = Harness()
    first = h.add(range(16), max_tokens=1)
    h.run()
    again, longer, other = h.add(range(16), max_tokens=1), h.add(range(20), max_tokens=1), h.add(range(1, 17), max_tokens=1)
    h.run()
    assert [r.metrics.num_cached_tokens for r in (first, again, longer, other)] == [0, 12, 16, 0]


@pytest.mark.parametrize("change", [{"cache_root": b"other model or salt"}, {"read_prefix_cache": False}])
def test_what_does_not_share_a_root_or_does_not_want_to_finds_nothing(change: dict) -> None:
    h = Harness()
    h.add(range(16), max_tokens=1)
    h.run()
    other = h.add(range(16), max_tokens=1, **change)
    h.run()
    assert other.metrics.num_cached_tokens == 0


def test_a_step_may_be_scheduled_before_the_last_is_committed() -> None:
    h = Harness(max_in_flight=2)
    request = h.add([1, 2, 3], max_tokens=5)
    h.engine.step()
    steps = h.executor.steps
    assert len(steps) == 2
    assert steps[1].ranges[0].pending == 1
    assert request.output_tokens == 1
    h.run()
    assert request.output_token_ids == h.expected(request)


def test_blocks_that_fall_out_of_a_window_come_back() -> None:
    h = Harness(windows=(5,), num_blocks=5, max_model_len=100)
    request = h.add([1], max_tokens=60, ignore_eos=True)
    h.run()
    assert len(request.output_token_ids) == 60
    assert request.metrics.num_preemptions == 0


@pytest.mark.parametrize(("prompt", "max_tokens", "message"), [
    ([], 1, "cannot be empty"), (range(128), 1, "longer than the maximum model length of 128"), (range(100), 20, "can never fit.*lower max_tokens to 17"),
])
def test_what_can_never_fit_is_refused_and_leaves_nothing(prompt, max_tokens: int, message: str) -> None:
    h = Harness(num_blocks=30)
    with pytest.raises(RequestValidationError, match=message):
        h.add(prompt, max_tokens=max_tokens)
    assert not h.engine.has_work
    h.scheduler.check_integrity()


def test_a_step_that_fails_ends_its_requests_and_no_others() -> None:
    h = Harness(fails_step=lambda step: step.step_id == 1, max_num_seqs=2)
    doomed, waiting = [h.add([i]) for i in range(2)], h.add([7])
    h.run()
    assert [r.finish.reason for r in doomed] == ["error", "error"]
    assert all("was made to fail" in str(r.error.__cause__) for r in doomed)
    assert waiting.output_token_ids == h.expected(waiting)


@pytest.mark.parametrize("failing", [{1}, {0, 2}, {0, 1, 2}])
def test_a_step_that_raises_is_repeated_for_each_request_alone(failing: set) -> None:
    def fails(step) -> bool:
        return step.step_id == 3 and (len(step.ranges) > 1 or step.ranges[0].sequence_id in failing)

    h = Harness(fails_step=fails, block_tokens=2, max_num_batched_tokens=128)
    requests = [h.add([i, 5, 6], max_tokens=9) for i in range(3)]
    h.run()
    for i, request in enumerate(requests):
        assert (request.finish.reason == "error") == (i in failing)
        assert request.output_token_ids == h.expected(request)[:3 if i in failing else None]
    assert [len(s.ranges) for s in h.executor.steps if s.step_id == 3] == [3, 1, 1, 1]


def test_with_steps_in_flight_behind_it_nothing_is_repeated() -> None:
    h = Harness(fails_step=lambda step: step.step_id == 1, max_in_flight=2)
    doomed = h.add([1])
    h.run()
    assert doomed.finish.reason == "error"
    assert [s.step_id for s in h.executor.steps].count(1) == 1


def add_siblings(h: Harness, prompt, n: int, **spec):
    sampling = SamplingParams(n=n, max_tokens=6)
    leader = h.engine.add(RequestSpec(tuple(prompt), sampling, **spec))
    return [leader, *(h.engine.add(RequestSpec(tuple(prompt), sampling, sample_index=i, leader=leader.sequence_id, **spec)) for i in range(1, n))]


@pytest.mark.parametrize("limits", [{}, {"enable_prefix_caching": False}, {"long_prefill_token_threshold": 7}], ids=str)
def test_siblings_wait_for_their_leaders_prompt_and_share_its_blocks(limits: dict) -> None:
    h = Harness(max_num_batched_tokens=64, **limits)
    siblings = add_siblings(h, range(21), 4)
    while not siblings[0].output_tokens:
        assert (h.scheduler.num_running, h.scheduler.num_waiting) in ((0, 4), (1, 3))
        h.step()
    h.step()
    assert [r.sequence_id for r in h.last_step.ranges] == [0, 1, 2, 3]
    assert [r.start for r in h.last_step.ranges] == [21, 20, 20, 20]
    assert h.scheduler.num_usable_blocks - h.scheduler.num_free_blocks == 5 + 4  # 20 tokens in common, 4 last blocks
    h.run()
    assert all(r.output_token_ids == h.expected(r) for r in siblings)


def test_siblings_start_when_their_leader_ends_without_a_token_and_can_be_forgotten_while_they_wait() -> None:
    h = Harness(max_num_batched_tokens=8)
    siblings = add_siblings(h, range(20), 4)
    h.step()
    h.engine.abort(siblings[2].sequence_id)
    assert h.scheduler.num_waiting == 2
    h.scheduler.check_integrity()
    h.engine.abort(siblings[0].sequence_id)
    h.run()
    assert [r.output_tokens for r in siblings] == [0, 6, 0, 6]


def test_a_row_that_fails_ends_its_request_and_no_others() -> None:
    h = Harness(fails_row=lambda r: "broken" if r.sequence_id == 1 else None)
    requests = [h.add([i, 5]) for i in range(3)]
    h.run()
    assert requests[1].finish.reason == "error"
    assert "broken" in str(requests[1].error)
    assert all(requests[i].output_token_ids == h.expected(requests[i]) for i in (0, 2))


def test_a_result_of_another_step_is_refused_before_anything_changes() -> None:
    h = Harness()
    h.add([1, 2])
    step = h.scheduler.schedule()
    for wrong in (StepResult(9, ()), StepResult(step.step_id, ()), StepResult(step.step_id, (RowResult(5, (1,)),)),
                  StepResult(step.step_id, (RowResult(0, (1, 2)),))):
        with pytest.raises(InternalError):
            h.scheduler.commit(step, wrong)
        h.scheduler.check_integrity()
    assert h.scheduler.commit(step, StepResult(step.step_id, (RowResult(0, (1,)),)))


def test_observers_hear_of_every_step_and_one_that_breaks_is_asked_no_more() -> None:
    heard: list = []

    def breaks(stats: object) -> None:
        heard.append("broken")
        raise RuntimeError

    h = Harness(observers=[heard.append, breaks])
    h.add([1, 2], max_tokens=3, ignore_eos=True)
    h.run()
    assert heard.count("broken") == 1
    assert [s.num_tokens for s in heard if s != "broken"] == [2, 1, 1]


def test_results_travel_as_bytes() -> None:
    logprobs = ((TokenLogprob(5, -0.5, 1), TokenLogprob(6, -1.5, 2)),)
    result = StepResult(3, (RowResult(1, (5,), logprobs), RowResult(2, error=RowError("E", "m", "t", "p")), RowResult(4, pooled=Pooled((2, 1), b"\0" * 8))))
    assert from_wire(to_wire(result)) == result


def test_a_pooling_request_ends_with_its_prompt_beside_others_that_generate() -> None:
    h = Harness(long_prefill_token_threshold=10)
    h.add(range(50, 62))
    h.engine.add(RequestSpec(tuple(range(128)), None, pooling=PoolingParams()))  # as long as max_model_len
    with pytest.raises(RequestValidationError, match="129 tokens, which is longer"):
        h.engine.add(RequestSpec(tuple(range(129)), None, pooling=PoolingParams()))
    assert from_wire(to_wire(h.scheduler.schedule())).new[1].pooling == PoolingParams()
    h = Harness(long_prefill_token_threshold=10)
    generating = h.add(range(50, 62))
    pooled = h.engine.add(RequestSpec(tuple(range(128)), None, pooling=PoolingParams()))
    h.run()
    assert generating.output_token_ids == h.expected(generating)
    assert (pooled.finish.reason, pooled.output_tokens, pooled.pooled) == ("stop", 0, h.model.pooled(range(128)))
    assert len([r for step in h.executor.steps for r in step.ranges if r.sequence_id == pooled.sequence_id]) == 13


def test_a_pooling_request_that_can_never_fit_is_refused_without_talk_of_output() -> None:
    h = Harness(num_blocks=5)
    assert h.engine.add(RequestSpec(tuple(range(16)), None, pooling=PoolingParams()))
    with pytest.raises(RequestValidationError, match=r"17 prompt tokens = 17 tokens to keep.*shorten the prompt to less than 17") as caught:
        h.engine.add(RequestSpec(tuple(range(17)), None, pooling=PoolingParams()))
    assert caught.value.parameter == "prompt_token_ids"
    h.run()


def test_what_is_no_plain_data_does_not_travel() -> None:
    h = Harness()
    request = h.add([1])
    request.spec.sampling.extra_args = {"function": print}
    with pytest.raises(UnsupportedFeatureError, match="plain data"):
        to_wire(h.scheduler.schedule())
    assert SamplingParams()


def test_a_model_that_keeps_nothing_needs_no_blocks() -> None:
    h = Harness(windows=(), num_blocks=0, chunkable=False, max_num_batched_tokens=128, max_num_seqs=3)
    requests = [h.add(range(first, first + n)) for first, n in ((0, 60), (100, 60), (200, 20), (300, 1))]
    h.step()
    assert [(r.sequence_id, r.start, r.num_tokens, r.new_blocks) for r in h.last_step.ranges] == [(0, 0, 60, ()), (1, 0, 60, ())]
    assert [new.block_ids for new in h.last_step.new] == [(), ()]
    assert (h.scheduler.num_free_blocks, h.scheduler.num_usable_blocks) == (0, 0)
    h.step()
    assert [r.num_tokens for r in h.last_step.ranges] == [1, 1, 20]
    h.run()
    assert all(r.output_token_ids == h.expected(r) and not r.metrics.num_preemptions for r in requests)


def test_without_blocks_nothing_is_found_in_a_prefix_cache() -> None:
    h = Harness(windows=(), num_blocks=0, chunkable=False, max_num_batched_tokens=128)
    first = h.add(range(40))
    h.step()
    second = h.add(range(40))
    sibling = h.engine.add(RequestSpec(tuple(range(40)), SamplingParams(n=2, max_tokens=3), leader=first.sequence_id))
    h.run()
    assert [r.metrics.num_cached_tokens for r in (first, second, sibling)] == [0, 0, 0]
    assert h.scheduler.forget_prefixes()


def test_a_budget_smaller_than_a_prompt_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="this model computes a prompt in one step"):
        Harness(windows=(), num_blocks=0, chunkable=False, max_num_batched_tokens=32, max_model_len=33)


def test_a_request_that_had_to_give_way_without_blocks_starts_again() -> None:
    h = Harness(windows=(), num_blocks=0, chunkable=False, max_num_batched_tokens=128)
    request = h.add(range(9))
    h.step()
    h.scheduler.preempt(request.sequence_id)
    h.run()
    assert (request.metrics.num_preemptions, request.metrics.num_recomputed_tokens) == (1, 9)
    assert request.output_token_ids == h.expected(request)
