"""What a step computed and the host wants to know: collected while it is computed, brought over in one copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Later = Callable[[], list[Tensor]]
"""Gives tensors on the host."""


class Outbox:
    """Of one step.

    Args:
        fetch: brings tensors to the host, and waits for them: `ComputeDevice.fetch`.
    """

    def __init__(self, fetch: Callable[[Sequence[Tensor]], list[Tensor]]) -> None:
        self._fetch = fetch
        self._sent: list[Tensor] = []
        self._arrived: list[Tensor] = []

    def add(self, *tensors: Tensor) -> Later:
        """Send tensors along. The first call of any answer brings over all that were added until then."""
        start, stop = len(self._sent), len(self._sent) + len(tensors)
        self._sent += tensors
        return lambda: self._all()[start:stop]

    def _all(self) -> list[Tensor]:
        if len(self._arrived) < len(self._sent):
            self._arrived += self._fetch(self._sent[len(self._arrived):])
        return self._arrived
