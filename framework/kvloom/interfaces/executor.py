"""Executors: where workers live (this process, several processes, Ray) and how steps reach them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvloom.interfaces.step import Step, StepResult
from kvloom.interfaces.worker import WorkerFactory, WorkerReport


class Executor(ABC):
    """Runs steps on workers. Registered with ``kvloom_register_executors``.

    `submit` and `collect` pair up first in, first out. An executor that overlaps returns from `submit` at once; one that does
    not may do the work there. Exceptions of a worker are raised by `collect` with the worker's own as ``__cause__``.
    """

    max_in_flight: int = 1
    """Steps that may be submitted before the first is collected."""

    @abstractmethod
    def start(self, factory: WorkerFactory, num_workers: int) -> list[WorkerReport]:
        """Make the workers, let each `load`; by rank."""

    @abstractmethod
    def allocate(self, num_blocks: int) -> None:
        """`Worker.allocate` on every worker."""

    @abstractmethod
    def submit(self, step: Step) -> None:
        """Hand over a step."""

    @abstractmethod
    def collect(self) -> StepResult:
        """The oldest submitted step's result; blocks without spinning. Raises what the step raised: the step is then over."""

    @abstractmethod
    def call(self, method: str | Callable[..., Any], timeout_s: float | None = None, args: Sequence[Any] = (),
             kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """Run a worker method (by name) or a function of the worker on every worker; results by rank.

        In process a function is called directly; across processes it must be a module-level one and travels as
        ``module:name``. After it each worker does `Worker.forget_recorded`.

        Raises:
            TimeoutError: after `timeout_s`. What is late then goes on: until it ends, everything but `close` raises `EngineStateError`.
        """

    def check_ready(self) -> None:
        """Raises `EngineStateError` while no step can be submitted. Asked before requests are queued."""

    def sleep(self, level: int) -> None:
        """`Worker.sleep` on every worker."""
        self.call("sleep", args=(level,))

    def wake_up(self, tags: Sequence[str]) -> None:
        """`Worker.wake_up` on every worker."""
        self.call("wake_up", args=(tuple(tags),))

    def start_profile(self, directory: str, prefix: str) -> None:
        """`Worker.start_profile` on every worker."""
        self.call("start_profile", args=(directory, prefix))

    def stop_profile(self) -> list[str]:
        """`Worker.stop_profile` on every worker; by rank."""
        return self.call("stop_profile")

    @abstractmethod
    def close(self) -> None:
        """Stop the workers and free their memory. Idempotent."""
