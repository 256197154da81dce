"""The executor for one device: a worker in this process, steps run where they are submitted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any

from kvloom.errors import EngineClosedError, EngineStateError, UnsupportedFeatureError
from kvloom.interfaces import Executor, Step, StepResult, Worker, WorkerFactory, WorkerReport


class InProcessExecutor(Executor):
    """Runs a step inside `submit`; `collect` hands out its result or raises its exception."""

    max_in_flight = 1

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._done: deque[StepResult | Exception] = deque()
        self._late: CallThread | None = None

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
        """See `Executor.call`. With a timeout it runs in a thread of its own, which nothing can stop when it is late."""
        worker = self._running()
        function = partial(_call, worker, method, args, kwargs or {})
        if timeout_s is None:
            return [function()]
        thread = CallThread(partial(copy_context().run, function))  # it is inside the call that makes it
        thread.start()
        try:
            thread.join(timeout_s)
        finally:  # it may also be Ctrl-C that ends the wait
            self._late = thread if thread.is_alive() else None
        if self._late is not None:
            raise TimeoutError(f"the call did not end within {timeout_s} s. It goes on in its thread; until it ends, the engine takes "
                               "nothing but close()")
        return [thread.result()]

    def check_ready(self) -> None:
        """See `Executor.check_ready`."""
        if self._late is not None and self._late.is_alive():
            raise EngineStateError("a call of collective_rpc that was late is still running on the worker; wait for its end, or close "
                                   "the engine")
        self._late = None

    def close(self) -> None:
        """See `Executor.close`."""
        if self._worker is not None:
            self._worker.close()
        self._worker = None
        self._done.clear()

    def _running(self) -> Worker:
        if self._worker is None:
            raise EngineClosedError("the engine was closed; make a new LLM")
        self.check_ready()
        return self._worker


def _call(worker: Worker, method: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        return _method(worker, method)(*args, **kwargs) if isinstance(method, str) else method(worker, *args, **kwargs)
    finally:
        worker.forget_recorded()


def _method(worker: Worker, name: str) -> Callable[..., Any]:
    """Raises `AttributeError` for what is no method, though it may be callable: a model, a property; and for what is private."""
    if (name.startswith("_") and not name.endswith("__")) or not callable(getattr(type(worker), name, None)):
        raise AttributeError(f"{type(worker).__name__!r} object has no method {name!r}")
    found: Callable[..., Any] = getattr(worker, name)
    return found


class CallThread(threading.Thread):
    """A call, and what came of it. It does not keep the process from ending."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(name="kvloom-call", daemon=True)
        self._function = function
        self._value: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """See `threading.Thread`."""
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001  (it is raised where the call was made)
            self._error = error

    def result(self) -> Any:
        """What the function returned, or raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._value
