"""By priority."""

from __future__ import annotations

from kvloom.interfaces import RequestView, SchedulingPolicy


class PriorityPolicy(SchedulingPolicy):
    """Lower priority numbers first, equal ones in the order of arrival; the newest of the largest number gives way.

    Requests that run are not stopped for a waiting one with a lower number unless blocks run out.
    """

    def sort_key(self, request: RequestView) -> tuple[float, ...]:
        """See `SchedulingPolicy.sort_key`."""
        return (request.priority, request.sequence_id)
