"""Sleep: between uses an engine gives its memory back, and takes it again. Nothing is computed unless it is awake::

                        sleep(1), sleep(2)
         +-----------------------------------------------+
         |                                               v
    +-------+              wake_up()                +--------+ <--- a wake-up that raises
    | AWAKE | <------------------------------------ | ASLEEP |
    +-------+                                       +--------+ --- one that cannot be undone ---> FAILED: only close() is left
         ^                                               |
         |     wake_up([other])    +--------------+      | wake_up([one part])
         +------------------------ | PARTLY_AWAKE | <----+
                                   +--------------+

The parts ``weights`` and ``kv_cache`` are asleep at either level. Level 1 keeps the weights on the host; level 2 drops them, and they
are read from the checkpoint again. The KV cache is dropped, and cached prefixes are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

from kvloom.errors import EngineStateError, RequestTypeError, RequestValidationError, shown
from kvloom.interfaces import Executor
from kvloom.interrupts import held
from kvloom.logs import get_logger

PARTS = ("weights", "kv_cache")
"""What sleeps, in the order in which it wakes up."""


class SleepState(Enum):
    """See the drawing above."""

    AWAKE = "awake"
    ASLEEP = "asleep"
    PARTLY_AWAKE = "partly awake"
    FAILED = "failed"


class Sleeper:
    """The state, and the transitions.

    Args:
        executor: its workers give memory back and take it.
        held_bytes: measures what the workers' processes hold.
    """

    def __init__(self, executor: Executor, held_bytes: Callable[[], int]) -> None:
        self._executor, self._measure = executor, held_bytes
        self._asleep: frozenset[str] = frozenset()
        self._level = 0
        self._has_failed = False
        self._before_bytes = self._asleep_bytes = 0

    @property
    def state(self) -> SleepState:
        """Where it is."""
        if self._has_failed:
            return SleepState.FAILED
        if not self._asleep:
            return SleepState.AWAKE
        return SleepState.ASLEEP if len(self._asleep) == len(PARTS) else SleepState.PARTLY_AWAKE

    def check_awake(self) -> None:
        """Raises `EngineStateError` unless it is awake."""
        if self._has_failed:
            raise EngineStateError("going to sleep or waking up failed and could not be undone; close this engine and make a new one")
        if self._asleep:
            raise EngineStateError(f"the engine sleeps at level {self._level}: {' and '.join(sorted(self._asleep))}; call wake_up()")

    def sleep(self, level: int) -> None:
        """Give memory back. Does nothing but warn when it sleeps already. No request may be under way.

        Args:
            level: 1 or 2.
        """
        if self.state is not SleepState.AWAKE:
            get_logger().warning("sleep() changes nothing", state=self.state.value, level=self._level, asked_for=level)
            return
        self._before_bytes = self._measure()
        with held():  # it takes no time, and what is half asleep is good for nothing
            try:
                self._executor.sleep(level)
            except BaseException:
                self._has_failed = True
                raise
            self._asleep, self._level = frozenset(PARTS), level
        self._asleep_bytes = self._measure()
        get_logger().info("asleep", level=level, before_bytes=self._before_bytes, asleep_bytes=self._asleep_bytes)

    def wake_up(self, tags: Iterable[str] | None) -> bool:
        """Take memory again. Does nothing but warn when all of that is awake. Whether everything is awake now.

        Args:
            tags: parts to wake; None wakes all.

        Raises:
            RequestTypeError, RequestValidationError: no list of parts.
            EngineStateError: going to sleep or waking up failed before and could not be undone.
            Exception: what the workers raise, such as `MemoryPlanError`; what was asleep before is asleep again.
        """
        wanted = _checked(tags)
        if self._has_failed:
            self.check_awake()
        waking = [part for part in PARTS if part in wanted and part in self._asleep]
        if not waking:
            get_logger().warning("wake_up() changes nothing", state=self.state.value, asked_for=sorted(wanted))
            return not self._asleep
        try:
            self._executor.wake_up(waking)
        except BaseException:
            self._roll_back()
            raise
        self._asleep = self._asleep.difference(waking)
        if self._asleep:
            return False
        get_logger().info("awake", level=self._level, before_bytes=self._before_bytes, asleep_bytes=self._asleep_bytes,
                          awake_bytes=self._measure())
        return True

    def _roll_back(self) -> None:
        """Everything sleeps again after a wake-up that raised; a part that was awake before too, since nothing runs without both."""
        with held():
            try:
                self._executor.sleep(self._level)
            except BaseException:
                self._has_failed = True
                raise
            self._asleep = frozenset(PARTS)


def _checked(tags: Iterable[str] | None) -> frozenset[str]:
    if tags is None:
        return frozenset(PARTS)
    message = f"tags must be a list with one or more of {', '.join(PARTS)}, or None for all; got {shown(tags)}"
    if not isinstance(tags, list | tuple | set | frozenset) or not all(isinstance(tag, str) for tag in tags):
        raise RequestTypeError(message, "tags", tags)
    if not tags or not set(tags) <= set(PARTS):
        raise RequestValidationError(message, "tags", tags)
    return frozenset(tags)
