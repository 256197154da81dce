"""What holds between a scheduler's queues, its requests and its steps in flight. For tests, and for an idle engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter

from kvloom.core.branches import BranchGroup
from kvloom.core.request import Request, RequestState
from kvloom.core.request_queue import RequestQueue
from kvloom.errors import InternalError
from kvloom.interfaces.step import Step


def check_queues(requests: Mapping[int, Request], held: Mapping[int, list[Request]], waiting: RequestQueue, running: RequestQueue,
                 leaving: Iterable[int], in_flight: Sequence[Step]) -> None:
    """Each queue holds exactly the requests whose state says so, and steps in flight are counted.

    Raises:
        InternalError: they do not; that is a bug.
    """
    every = requests.values()
    for request in every:
        request.check_integrity()
    _same("held", (r for some in held.values() for r in some), (r for r in every if r.state is RequestState.HELD))
    _same("waiting", waiting, (r for r in every if r.state is RequestState.WAITING))
    _same("running", running, (r for r in every if r.has_place))
    _same("leaving", (requests[i] for i in leaving), (r for r in every if r.state in (RequestState.DRAINING, RequestState.FINISHED)))
    counted = Counter(done.sequence_id for step in in_flight for done in step.ranges)
    if counted != {r.sequence_id: r.in_flight for r in every if r.in_flight}:
        raise InternalError(f"in flight are {counted}, the requests say otherwise")


def check_groups(groups: Iterable[BranchGroup], requests: Mapping[int, Request]) -> None:
    """Branches live, and a round that is over was decided.

    Raises:
        InternalError: not so; that is a bug.
    """
    listed = {b.sequence_id: group for group in groups for b in group.branches}
    if listed != {r.sequence_id: r.group for r in requests.values() if r.group is not None and r.finish is None}:
        raise InternalError(f"the live branches are not those that the groups list: {sorted(listed)}")
    for group in listed.values():
        if group.is_undecided:
            raise InternalError(f"the branches of sequence {group.root.sequence_id} wait for a decision")


def _same(what: str, listed: Iterable[Request], expected: Iterable[Request]) -> None:
    """`listed` holds exactly the `expected` requests, a queue in its order."""
    by_order = sorted(expected, key=attrgetter("order"))
    if sorted(listed, key=attrgetter("order")) != by_order or (isinstance(listed, RequestQueue) and list(listed) != by_order):
        raise InternalError(f"the {what} requests are not those whose state says so: {[r.sequence_id for r in by_order]}")
