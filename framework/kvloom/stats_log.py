"""What ``disable_log_stats=False`` adds: an event about throughput and cache use every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvloom.interfaces import StepStats
from kvloom.logs import get_logger

INTERVAL_S = 10.0


class StatsLog:
    """An observer of steps. Logs every `INTERVAL_S` while there is work, and once when it is done.

    Args:
        clock_s: seconds, rising.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._num_tokens = self._num_steps = self._num_preempted = 0
        self._busy_s = 0.0
        self._logged_s = clock_s()

    def __call__(self, stats: StepStats) -> None:
        """One step was committed."""
        self._num_steps += 1
        self._num_tokens += stats.num_tokens
        self._num_preempted += stats.num_preempted
        self._busy_s += stats.seconds
        is_idle = not stats.num_running and not stats.num_waiting
        if is_idle or self._clock_s() - self._logged_s >= INTERVAL_S:
            self._log(stats)

    def _log(self, stats: StepStats) -> None:
        used = 1 - stats.free_blocks / stats.total_blocks if stats.total_blocks else 0.0
        get_logger().info(
            "engine stats", steps=self._num_steps, tokens=self._num_tokens, busy_s=round(self._busy_s, 3),
            tokens_per_s=round(self._num_tokens / self._busy_s, 1) if self._busy_s else 0.0, running=stats.num_running,
            waiting=stats.num_waiting, preempted=self._num_preempted, kv_cache_used=round(used, 3))
        self._num_tokens = self._num_steps = self._num_preempted = 0
        self._busy_s, self._logged_s = 0.0, self._clock_s()
