"""First come, first served."""

from __future__ import annotations

from kvloom.interfaces import RequestView, SchedulingPolicy


class FirstComePolicy(SchedulingPolicy):
    """In the order of arrival; the newest gives way. A preempted request keeps its place."""

    def sort_key(self, request: RequestView) -> tuple[float, ...]:
        """See `SchedulingPolicy.sort_key`."""
        return (request.sequence_id,)
