"""The loop: schedule, submit, collect, commit. A step that raises is run again, one request at a time."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from kvloom.core.request import Request, RequestSpec
from kvloom.core.scheduler import Scheduler
from kvloom.errors import EngineStateError, InternalError
from kvloom.interfaces.executor import Executor
from kvloom.interfaces.stats import StepStats
from kvloom.interfaces.step import RowError, RowResult, Step, StepResult
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
        self._interrupted: list[Request] = []  # they ended when a step was interrupted, and nobody heard of it yet
        self._is_torn = False  # something that is no Exception may have left the books half written

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

    def take_interrupted(self) -> list[Request]:
        """Requests that ended because `step` was interrupted (Ctrl-C) and that it could not return."""
        ended, self._interrupted = self._interrupted, []
        return ended

    def step(self) -> list[Request]:
        """Keep the executor busy and commit the oldest step. Returns the requests that got tokens or ended.

        Raises:
            EngineStateError: an earlier step was interrupted, by a signal's handler or a second Ctrl-C, while its requests were being
                scheduled or its tokens taken over.
        """
        if self._is_torn:
            raise EngineStateError("a step was interrupted at a moment that cannot be made good; close this engine and make a new one")
        self._is_torn = True
        try:
            updated = self._step()
        except Exception:
            self._is_torn = False
            raise
        self._is_torn = False
        return updated

    def _step(self) -> list[Request]:
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
        updated = self._finish(step)
        self._in_flight.popleft()
        self._report(step, started_s)
        return updated

    def _finish(self, step: Step) -> list[Request]:
        """Collect and commit the oldest step.

        When it raised, nobody knows for which request: each is tried once more alone, and those that raise again end. With steps in
        flight behind it, which were computed from what it did not give, all its requests end.
        """
        causes: dict[int, Exception] = {}
        try:
            result = self._executor.collect()
        except Exception as error:  # noqa: BLE001  (the requests whose fault it is carry it)
            if len(self._in_flight) > 1:
                return self.scheduler.fail(step, error)
            get_logger().warning("step raised; its requests run again one by one", step=step.step_id, requests=len(step.ranges),
                                 error=f"{type(error).__name__}: {error}")
            _let_go(error)
            result = self._run_singly(step, causes)
        except BaseException:  # it stays in flight, and is collected next time
            self._is_torn = False
            raise
        try:
            return self.scheduler.commit(step, result, causes)
        except InternalError as error:  # a result of something else
            return self.scheduler.fail(step, error)

    def _run_singly(self, step: Step, causes: dict[int, Exception]) -> StepResult:
        rows: list[RowResult] = []
        for r in step.ranges:
            self._submit(step.only(r), part_of=step)
            try:
                rows += self._executor.collect().rows
            except Exception as error:  # noqa: BLE001  (see `_finish`)
                _let_go(error)
                causes[r.sequence_id] = error
                rows.append(RowResult(r.sequence_id, error=RowError(type(error).__name__, str(error))))
        return StepResult(step.step_id, tuple(rows))

    def _submit(self, step: Step, part_of: Step | None = None) -> None:
        """What `submit` raises is no step's failure but the executor's, or the user's Ctrl-C: nothing is collected for it."""
        try:
            self._executor.submit(step)
        except BaseException as error:
            if part_of is not None:
                self._in_flight.popleft()
            self._interrupted += self.scheduler.fail(part_of or step, error)
            self._is_torn = False
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
            scheduler.num_free_blocks, scheduler.num_usable_blocks, time.monotonic() - started_s, len(step.swap_out), len(step.swap_in),
        )
        for observer in tuple(self._observers):
            try:
                observer(stats)
            except Exception as error:  # noqa: BLE001  (an onlooker must not end requests: it is named and asked no more)
                self._observers.remove(observer)
                get_logger().warning("step observer failed and is switched off", observer=repr(observer), error=repr(error),
                                     exc_info=error)


def _let_go(error: BaseException) -> None:
    """Whoever keeps an error must not keep the tensors of the step that raised it, which its frames refer to."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
