"""The loop: schedule, submit, collect, commit."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from kvloom.core.request import Request, RequestSpec
from kvloom.core.scheduler import Scheduler
from kvloom.errors import InternalError
from kvloom.interfaces.executor import Executor
from kvloom.interfaces.stats import StepStats
from kvloom.interfaces.step import Step
from kvloom.logs import get_logger

StepObserver = Callable[[StepStats], object]


class Engine:
    """A scheduler and an executor, driven by whoever calls `step` while `has_work`. Not thread-safe.

    Args:
        scheduler: made for the executor's KV groups and blocks.
        executor: started and allocated; the caller closes it.
        observers: called with one `StepStats` after each commit (``kvloom_step_finished``). One that raises is logged and
            switched off.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, observers: Sequence[StepObserver] = ()) -> None:
        self.scheduler = scheduler
        self._executor = executor
        self._observers = list(observers)
        self._in_flight: deque[tuple[Step, float]] = deque()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._in_flight or self.scheduler.num_running or self.scheduler.num_waiting)

    def add(self, spec: RequestSpec) -> Request:
        """See `Scheduler.add`."""
        return self.scheduler.add(spec)

    def finish(self, sequence_id: int, reason: str, stop_reason: int | str | None = None) -> None:
        """See `Scheduler.finish`."""
        self.scheduler.finish(sequence_id, reason, stop_reason)

    def abort(self, sequence_id: int) -> None:
        """Forget a request; unknown and ended ones are left alone."""
        self.scheduler.finish(sequence_id, "abort")

    def step(self) -> list[Request]:
        """Keep the executor busy and commit the oldest step. Returns the requests that got tokens or ended."""
        while len(self._in_flight) < self._executor.max_in_flight:
            started_s = time.monotonic()
            step = self.scheduler.schedule()
            if step is None:
                break
            self._submit(step)
            self._in_flight.append((step, started_s))
        if not self._in_flight:
            return self._idle()
        step, started_s = self._in_flight[0]
        try:
            updated = self.scheduler.commit(step, self._executor.collect())
        except Exception as error:  # noqa: BLE001  (the requests carry it; running them again one by one will start here)
            updated = self.scheduler.fail(step, error)
        self._in_flight.popleft()
        self._report(step, started_s)
        return updated

    def _submit(self, step: Step) -> None:
        """What `submit` raises is no step's failure but the executor's, or the user's Ctrl-C: nothing is collected for it."""
        try:
            self._executor.submit(step)
        except BaseException as error:
            self.scheduler.fail(step, error)
            raise

    def _idle(self) -> list[Request]:
        if self.has_work:
            raise InternalError(f"{self.scheduler.num_running} running and {self.scheduler.num_waiting} waiting requests, but none "
                                "can go on")
        return []

    def _report(self, step: Step, started_s: float) -> None:
        if not self._observers:
            return
        scheduler = self.scheduler
        stats = StepStats(
            step.step_id, step.num_tokens, scheduler.num_running, scheduler.num_waiting, len(step.preempted),
            scheduler.num_free_blocks, scheduler.num_usable_blocks, time.monotonic() - started_s,
        )
        for observer in tuple(self._observers):
            try:
                observer(stats)
            except Exception as error:  # noqa: BLE001  (an onlooker must not end requests: it is named and asked no more)
                self._observers.remove(observer)
                get_logger().warning("step observer failed and is switched off", observer=repr(observer), error=repr(error),
                                     exc_info=error)
