"""Blocks that leave the device are found again on the host; what the moves keep from being computed again is shown with its bytes."""

from __future__ import annotations

import pytest
from core_helpers import Harness

from kvloom.core.host_tier import HostTier
from kvloom.errors import ConfigError, InternalError
from kvloom.interfaces import HostTierReport, Step

FAST_LINK = HostTierReport(num_blocks=64, block_bytes=1000, bytes_per_s=1e9, tokens_per_s=1000.0)
SLOW_LINK = HostTierReport(num_blocks=64, block_bytes=1000, bytes_per_s=1e4, tokens_per_s=1000.0)


def moved(h: Harness) -> tuple[int, int]:
    """Bytes to the host and back."""
    blocks = [(len(s.swap_out), len(s.swap_in)) for s in h.executor.steps]
    return sum(out for out, _ in blocks) * FAST_LINK.block_bytes, sum(back for _, back in blocks) * FAST_LINK.block_bytes


@pytest.mark.parametrize("limits", [{}, {"enable_prefix_caching": False}], ids=str)
@pytest.mark.parametrize(("windows", "num_blocks"), [((None,), 9), ((None, 5), 13), ((3,), 65)], ids=str)
def test_sequences_that_gave_way_are_moved_and_compute_nothing_twice(limits: dict, windows: tuple, num_blocks: int) -> None:
    """More than fits. Prompts differ, so nothing is shared; the last, partly filled block travels too."""
    tight = {"windows": windows, "num_blocks": num_blocks, "max_num_batched_tokens": 64, **limits}
    seen = {}
    for name, tier in (("moved", FAST_LINK), ("recomputed", None), ("not worth it", SLOW_LINK)):
        h = Harness(host_tier=tier, **tight)
        requests = [h.add([i, *range(11)], max_tokens=19, ignore_eos=True, cache_root=bytes([i])) for i in range(2)]
        for _ in range(4):
            h.step()
        assert h.scheduler.preempt(1)
        h.run()
        assert all(r.output_token_ids == h.expected(r) for r in requests)
        seen[name] = sum(r.metrics.num_recomputed_tokens for r in requests), moved(h)
    (recomputed, (out_bytes, in_bytes)) = seen["moved"]
    assert recomputed == 0
    assert out_bytes > 0
    assert in_bytes > 0
    assert seen["recomputed"] == seen["not worth it"] == (seen["recomputed"][0], (0, 0))
    assert seen["recomputed"][0] > 0


def test_prefixes_that_fell_out_of_the_device_are_found_on_the_host() -> None:
    h = Harness(host_tier=FAST_LINK, num_blocks=9, max_num_batched_tokens=64)
    h.add(range(16), max_tokens=1)
    h.run()
    for start in (100, 200, 300):
        h.add(range(start, start + 28), max_tokens=1)
        h.run()
    again = h.add(range(16), max_tokens=3)
    h.run()
    assert again.metrics.num_cached_tokens == 12
    assert again.output_token_ids == h.expected(again)
    assert [len(s.swap_in) for s in h.executor.steps if s.swap_in] == [3]
    assert moved(h)[1] == 3 * FAST_LINK.block_bytes
    third = h.add(range(16), max_tokens=3)
    h.run()
    assert third.metrics.num_cached_tokens == 12
    assert moved(h)[1] == 3 * FAST_LINK.block_bytes, "what came back is found on the device"


def test_what_comes_back_and_leaves_again_is_not_moved_twice() -> None:
    heard: list = []
    h = Harness(host_tier=FAST_LINK, num_blocks=9, max_num_batched_tokens=64, observers=[heard.append])
    for _ in range(3):
        for start in (0, 100):
            h.add(range(start, start + 28), max_tokens=1)
            h.run()
    sent = [move.host_block for s in h.executor.steps for move in s.swap_out]
    assert len(sent) == len(set(sent)) > 0
    assert moved(h)[1] > moved(h)[0]
    assert [(s.blocks_out, s.blocks_in) for s in heard] == [(len(s.swap_out), len(s.swap_in)) for s in h.executor.steps]


def test_the_oldest_content_makes_room_but_none_that_is_moving_or_pinned() -> None:
    tier = HostTier(2, worth_tokens=1)
    for digest in (b"a", b"b", b"c"):  # nothing has arrived yet: no room for c
        tier.store(0, digest, 5)
    assert [tier.has(0, digest) for digest in (b"a", b"b", b"c")] == [True, True, False]
    arrive(tier, done=True)
    assert [tier.has(0, digest) for digest in (b"a", b"b", b"c")] == [True, True, False]
    tier.pin([(0, b"a")])
    tier.store(0, b"c", 6)
    tier.store(0, b"d", 7)
    arrive(tier, done=True)
    assert [tier.has(0, digest) for digest in (b"a", b"b", b"c", b"d")] == [True, False, True, False]
    tier.store(0, b"d", 7)
    arrive(tier, done=False)
    assert [tier.has(0, digest) for digest in (b"a", b"c", b"d")] == [False, True, False]


def arrive(tier: HostTier, *, done: bool) -> None:
    """A step with the tier's moves is scheduled and over."""
    out, back = tier.take_moves()
    step = Step(0, (), swap_out=out, swap_in=back)
    tier.check_integrity([step])
    tier.landed(step, done=done)
    tier.check_integrity([])


def test_forgetting_prefixes_forgets_those_on_the_host() -> None:
    h = Harness(host_tier=FAST_LINK, num_blocks=9, max_num_batched_tokens=64)
    for start in (0, 100):
        h.add(range(start, start + 28), max_tokens=1)
        h.run()
    assert h.scheduler.forget_prefixes()
    h.scheduler.check_integrity()
    again = h.add(range(28), max_tokens=1)
    h.run()
    assert again.metrics.num_cached_tokens == 0


@pytest.mark.parametrize("depth", [1, 3])
def test_content_that_a_failed_step_should_have_moved_is_not_relied_upon(depth: int) -> None:
    """The worker fails a step before it moved anything; whoever looks for those prefixes computes them."""
    h = Harness(host_tier=FAST_LINK, num_blocks=9, max_num_batched_tokens=64, max_in_flight=depth,
                fails_step=lambda step: bool(step.swap_out) and not h.failed)
    h.failed = False
    h.add(range(28), max_tokens=1)
    h.run()
    doomed = h.add(range(100, 128), max_tokens=1)
    h.run()
    assert doomed.finish.reason == "error"
    h.failed = True
    again = h.add(range(28), max_tokens=3)
    h.run()
    assert again.output_token_ids == h.expected(again)


def test_a_step_that_comes_again_for_each_request_moves_once() -> None:
    """The second time only the ranges count: the blocks that were moved out hold something else by then."""
    h = Harness(host_tier=FAST_LINK, max_num_batched_tokens=64, fails_step=lambda step: bool(step.swap_in) and len(step.ranges) > 1)
    requests = [h.add([i, *range(11)], max_tokens=19, ignore_eos=True, cache_root=bytes([i])) for i in range(2)]
    for _ in range(4):
        h.step()
    h.scheduler.preempt(1)
    h.run()
    assert len([s for s in h.executor.steps if s.swap_in]) > len({s.step_id for s in h.executor.steps if s.swap_in})
    assert all(r.output_token_ids == h.expected(r) for r in requests)
    assert sum(r.metrics.num_recomputed_tokens for r in requests) == 0


@pytest.mark.parametrize(("bytes_per_s", "tokens_per_s", "worth"), [(1e9, 1000.0, 1), (1e6, 1000.0, 2), (1e6, 2000.0, 4), (1e6, 2001.0, None)])
def test_moving_is_chosen_where_it_costs_less_than_computing(bytes_per_s: float, tokens_per_s: float, worth: int | None) -> None:
    """A column of one block of 1000 bytes is moved out and in: 2000 bytes."""
    tier = HostTier.of(HostTierReport(5, 1000, bytes_per_s, tokens_per_s), num_groups=1, block_tokens=4)
    assert (None if tier is None else tier.worth_tokens) == worth


@pytest.mark.parametrize("figures", [(-1, 1, 1.0, 1.0), (1, 0, 1.0, 1.0), (1, 1, 0.0, 1.0), (1, 1, float("nan"), 1.0), (1, 1, 1.0, float("inf"))])
def test_a_host_tier_without_figures_is_refused(figures: tuple) -> None:
    with pytest.raises(ConfigError, match="positive figures"):
        HostTierReport(*figures)


def test_a_block_in_two_places_is_noticed() -> None:
    tier = HostTier(2, 1)
    tier.store(0, b"a", 5)
    tier.check_integrity([])
    tier.take_moves()
    with pytest.raises(InternalError, match="are on their way and"):
        tier.check_integrity([])
