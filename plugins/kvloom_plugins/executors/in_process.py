"""The executor for one device: a worker in this process, steps run where they are submitted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvloom.errors import EngineClosedError, UnsupportedFeatureError
from kvloom.interfaces import Executor, Step, StepResult, Worker, WorkerFactory, WorkerReport


class InProcessExecutor(Executor):
    """Runs a step inside `submit`; `collect` hands out its result or raises its exception."""

    max_in_flight = 1

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._done: deque[StepResult | Exception] = deque()

    def start(self, factory: WorkerFactory, num_workers: int) -> list[WorkerReport]:
        """See `Executor.start`."""
        if num_workers != 1:
            raise UnsupportedFeatureError("distributed_executor_backend", "uni", f"it runs one worker, not {num_workers}")
        self._worker = factory(0)
        return [self._worker.load()]

    def allocate(self, num_blocks: int) -> None:
        """See `Executor.allocate`."""
        self._running().allocate(num_blocks)

    def submit(self, step: Step) -> None:
        """See `Executor.submit`."""
        try:
            self._done.append(self._running().execute(step))
        except Exception as error:  # noqa: BLE001  (collect raises it: the engine decides whose fault it is)
            self._done.append(error)

    def collect(self) -> StepResult:
        """See `Executor.collect`."""
        result = self._done.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    def call(self, method: str | Callable[..., Any], timeout_s: float | None = None, args: Sequence[Any] = (),
             kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """See `Executor.call`. A call in this process cannot be interrupted, so a timeout is refused."""
        if timeout_s is not None:
            raise UnsupportedFeatureError("timeout", timeout_s, "a call in this process cannot be interrupted; leave it out")
        worker = self._running()
        function = getattr(worker, method) if isinstance(method, str) else method
        return [function(*args, **(kwargs or {})) if isinstance(method, str) else function(worker, *args, **(kwargs or {}))]

    def close(self) -> None:
        """See `Executor.close`."""
        if self._worker is not None:
            self._worker.close()
        self._worker = None
        self._done.clear()

    def _running(self) -> Worker:
        if self._worker is None:
            raise EngineClosedError("the engine was closed; make a new LLM")
        return self._worker
