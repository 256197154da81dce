"""Scheduling policies: in which order requests are served, and who gives way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol


class RequestView(Protocol):
    """Read-only view of a request in the scheduler."""

    @property
    def sequence_id(self) -> int:
        """The engine's id: rises with arrival."""

    @property
    def arrival_s(self) -> float:
        """Monotonic clock at admission."""

    @property
    def priority(self) -> int:
        """As the caller gave it; lower is served earlier."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""

    @property
    def output_tokens(self) -> int:
        """Tokens generated and committed so far."""

    @property
    def computed_tokens(self) -> int:
        """Tokens whose state is in the cache, committed."""

    @property
    def num_preemptions(self) -> int:
        """How often it had to give way."""


class SchedulingPolicy(ABC):
    """Orders requests. Registered with ``kvloom_register_schedulers``; asked once when a request arrives or is preempted."""

    @abstractmethod
    def sort_key(self, request: RequestView) -> tuple[float, ...]:
        """Smaller is served earlier. When blocks run out, the running request with the largest key is preempted.

        Must be total and stable: the same request always gives the same key.
        """
