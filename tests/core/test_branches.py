"""Requests that branch: shared blocks, copies, preemption, failures. What they find is what a loop without a cache finds."""

from __future__ import annotations

import pytest
from core_helpers import Harness, beam_rule, branching_spec, found, searched

from kvloom.core import BranchRule
from kvloom.errors import RequestFailedError, RequestValidationError
from kvloom.interfaces import BlockCopy, Branch, Decision, FinishedBranch, HostTierReport
from kvloom.testing.fake_model import FakeModel

PROMPT = list(range(100, 140))
NO_END = {"ignore_eos": True}


def held(h: Harness) -> int:
    return h.scheduler.num_usable_blocks - h.scheduler.num_free_blocks


def test_branches_hold_the_prompt_once_and_one_block_each() -> None:
    seen: list[int] = []
    h = Harness(max_num_batched_tokens=64, fails_step=lambda step: bool(seen.append(held(h))))
    h.search(PROMPT, beam_width=4, max_tokens=5, **NO_END)
    h.run()
    assert seen == [10, 14, 14, 14, 14]
    assert held(h) == 0


def test_a_partly_filled_block_is_copied_for_all_branches_but_one() -> None:
    h = Harness(max_num_batched_tokens=64)
    h.search([*PROMPT, 7], beam_width=4, max_tokens=3, **NO_END)
    h.step()
    assert held(h) == 11
    h.step()
    assert len(h.last_step.copies) == 3
    assert {c.source for c in h.last_step.copies} == {h.executor.steps[0].new[0].block_ids[0][-1]}
    h.run()


def test_a_branch_that_goes_on_alone_keeps_its_block_and_is_not_introduced_again() -> None:
    def decide(candidates):
        if len(candidates[0].token_ids) == 9:
            return Decision((), tuple(FinishedBranch(c.branch, (), 0.0, c.cumulative_logprob, "length") for c in candidates))
        if len(candidates) == 1:
            return Decision(tuple(Branch(0, c.token_id, c.logprob) for c in candidates[0].best[:2]))
        return Decision(tuple(Branch(c.branch, c.best[1].token_id, c.best[1].logprob) for c in candidates))

    h = Harness()
    needs = beam_rule(PROMPT, frozenset(), 50, beam_width=2, max_tokens=10).needs
    request = h.engine.add(branching_spec([1, 2, 3, 4, 5], BranchRule(needs, decide)))
    h.run()
    assert [len(s.new) for s in h.executor.steps] == [1, 1, *[0] * 8]
    assert [len(s.copies) for s in h.executor.steps] == [0, 1, *[0] * 8]
    assert len({r.token_ids for r in request.group.results}) == 2


@pytest.mark.parametrize("windows", [(None,), (6,), (None, 6), (4, None, 11)])
@pytest.mark.parametrize("limits", [{}, {"enable_prefix_caching": False}, {"max_num_batched_tokens": 3}, {"enable_chunked_prefill": False, "max_num_batched_tokens": 128}],
                         ids=["", "no cache", "few", "whole"])
@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_several_find_what_a_loop_without_a_cache_finds(windows, limits: dict, max_in_flight: int) -> None:
    h = Harness(windows=windows, num_blocks=200, max_in_flight=max_in_flight, model=FakeModel(97, eos_token_id=3, eos_every=9), **limits)
    pairs = [h.search(PROMPT[:length], cache_root=bytes([length]), beam_width=width, max_tokens=9) for length, width in ((3, 4), (17, 2), (40, 3), (8, 1))]
    plain = h.add([5, 6, 7], ignore_eos=True)
    h.run()
    for request, expected in pairs:
        assert found(request) == expected
    assert plain.output_token_ids == h.expected(plain)


def test_branches_that_gave_way_are_computed_again_and_find_the_same() -> None:
    h = Harness(num_blocks=200)
    request, expected = h.search(PROMPT, beam_width=4, max_tokens=12, **NO_END)
    count = 0
    while h.engine.has_work:
        count += 1
        if count % 3 == 0:
            for branch in request.group.branches[: count % 4 + 1]:
                assert h.scheduler.preempt(branch.sequence_id)
        h.step()
    assert found(request) == expected
    assert request.metrics.num_preemptions > 4
    assert held(h) == 0


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("host_blocks", [0, 7, 100])
@pytest.mark.parametrize(("block_tokens", "num_blocks"), [(1, 70), (4, 22)])
def test_groups_that_do_not_fit_together_let_one_go_first(cached: bool, host_blocks: int, block_tokens: int, num_blocks: int) -> None:
    tier = HostTierReport(host_blocks, block_bytes=1, bytes_per_s=1e9, tokens_per_s=1.0) if host_blocks else None
    h = Harness(num_blocks=num_blocks, block_tokens=block_tokens, max_num_seqs=8, enable_prefix_caching=cached, host_tier=tier)
    pairs = [h.search([i, *range(17)], beam_width=4, max_tokens=12, **NO_END) for i in range(3)]
    h.run()
    for request, expected in pairs:
        assert found(request) == expected
    assert sum(r.metrics.num_preemptions for r, _ in pairs) > 0


def test_one_that_began_has_places_for_all_its_branches() -> None:
    h = Harness(max_num_seqs=6, num_blocks=200)
    pairs = [h.search([i, 1, 2], beam_width=4, max_tokens=6, **NO_END) for i in range(3)]
    plain = [h.add([i, 5]) for i in range(4)]
    h.step()
    assert (h.scheduler.num_running, h.scheduler.num_waiting) == (4, 6), "two places are left, which a group of four does not take"
    h.run()
    assert [found(r) for r, _ in pairs] == [expected for _, expected in pairs]
    assert [r.metrics.num_preemptions for r, _ in pairs] == [0, 0, 0]
    assert [r.output_token_ids for r in plain] == [h.expected(r) for r in plain]


def test_full_blocks_of_forks_are_found_by_later_prompts() -> None:
    h = Harness(num_blocks=200)
    request, _ = h.search(PROMPT, beam_width=3, max_tokens=11, **NO_END)
    h.run()
    for result in request.group.results:
        follower = h.add([*PROMPT, *result.token_ids, 1])
        h.run()
        assert follower.metrics.num_cached_tokens == 48
        assert follower.output_token_ids == h.expected(follower)


def test_an_end_from_outside_ends_all_branches() -> None:
    h = Harness(num_blocks=200)
    request, _ = h.search(PROMPT, beam_width=4, max_tokens=12, **NO_END)
    other, expected = h.search([1, 2], beam_width=2, max_tokens=5, **NO_END)
    for _ in range(5):
        h.step()
    h.engine.abort(request.sequence_id)
    h.scheduler.check_integrity()
    h.run()
    assert request.finish.reason == "abort"
    assert found(other) == expected


def test_a_row_that_fails_ends_its_group_and_no_other_request() -> None:
    broken: set[int] = set()
    h = Harness(num_blocks=200, fails_row=lambda r: "broken" if r.sequence_id in broken else None)
    pairs = [h.search([i, 1, 2], beam_width=2, max_tokens=8, **NO_END) for i in range(4)]
    for _ in range(3):
        h.step()
    broken.add(pairs[2][0].group.branches[1].sequence_id)
    updated = h.step()
    assert updated == [pairs[2][0]]
    assert isinstance(pairs[2][0].error, RequestFailedError)
    h.run()
    assert [found(r) for i, (r, _) in enumerate(pairs) if i != 2] == [e for i, (_, e) in enumerate(pairs) if i != 2]


def test_a_step_that_raises_is_repeated_and_copies_are_not_made_twice() -> None:
    failing: set[int] = set()
    h = Harness(num_blocks=200, fails_step=lambda step: len(step.ranges) > 1 and step.step_id in failing)
    pairs = [h.search([i, 1, 2, 3, 4], beam_width=3, max_tokens=8, **NO_END) for i in range(2)]
    failing |= {1, 2, 3, 5}
    h.run()
    assert [found(r) for r, _ in pairs] == [expected for _, expected in pairs]


def test_with_steps_in_flight_a_step_that_raises_ends_its_groups() -> None:
    failing: set[int] = set()
    h = Harness(num_blocks=200, max_in_flight=2, fails_step=lambda step: step.step_id in failing, max_num_batched_tokens=4)
    pairs = [h.search([i, 1, 2, 3, 4], beam_width=3, max_tokens=8, **NO_END) for i in range(3)]
    for _ in range(4):
        h.step()
    failing.add(h.last_step.step_id)
    for _ in range(400):
        if not h.engine.has_work:
            break
        h.step()
    ended = [r.finish.reason for r, _ in pairs]
    assert "error" in ended
    for request, expected in pairs:
        assert request.finish.reason == "error" or found(request) == expected
    assert held(h) == 0


@pytest.mark.parametrize(("decision", "message"), [
    (Decision((Branch(0, 1, -1.0),) * 3), "3 branches live on, it asked for 2"), (Decision((Branch(1, 1, -1.0),)), "none of the 1 branches"),
    (Decision((Branch(0, 1, float("nan")),)), "not a finite number"), (Decision(()), "nothing finished"), (None, "the decoder raised TypeError"),
])
def test_a_decision_that_cannot_be_fails_its_request(decision: Decision, message: str) -> None:
    h = Harness()
    needs = beam_rule([1], frozenset(), 50, beam_width=2).needs
    request = h.engine.add(branching_spec([1, 2], BranchRule(needs, lambda candidates: decision)))
    other, expected = h.search([3, 4], beam_width=2, **NO_END)
    h.run()
    assert message in str(request.error)
    assert found(other) == expected


def test_a_branch_may_not_outgrow_its_bound() -> None:
    h = Harness()
    needs = beam_rule([1], frozenset(), 50, beam_width=1, max_tokens=3).needs
    request = h.engine.add(branching_spec([1, 2], BranchRule(needs, lambda candidates: Decision((Branch(0, 1, -1.0),)))))
    h.run()
    assert "lives on with 3 tokens" in str(request.error)


def test_what_can_never_fit_is_refused_with_the_arithmetic() -> None:
    h = Harness(num_blocks=21)
    with pytest.raises(RequestValidationError, match=r"keeps up to 9 sequences at a time, and max_num_seqs is 8") as wide:
        h.search([1, 2], beam_width=9)
    assert (wide.value.parameter, wide.value.value) == ("beam_width", 9)
    with pytest.raises(RequestValidationError, match=r"55 tokens to keep for each of 4 branches.* 26 blocks.*lower max_tokens to 9") as large:
        h.search(PROMPT, beam_width=4, max_tokens=16)
    assert large.value.parameter == "max_tokens"
    request, expected = h.search(PROMPT, beam_width=4, max_tokens=9, **NO_END)
    h.run()
    assert found(request) == expected


def test_the_loop_of_the_tests_prefers_the_most_probable() -> None:
    model = FakeModel(97)
    (best, *rest) = searched(model, [1], beam_rule([1], frozenset(), 50, beam_width=3, max_tokens=2))
    assert all(score <= best[1] for _, score in rest)
    assert len(rest) == 2


def test_copies_travel_as_bytes() -> None:
    from kvloom.core.wire import from_wire, to_wire
    from kvloom.interfaces import Step, TokenRange

    step = Step(3, (TokenRange(7, 4, 1, sample=True, given=(9,)),), copies=(BlockCopy(0, 1, 2, 7),))
    assert from_wire(to_wire(step)) == step
