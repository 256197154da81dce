"""The number that the next request gets."""

from __future__ import annotations


class RequestCounter:
    """Counts requests over the life of an engine: ``request_id`` is the number as a text, and requests without a seed draw by it."""

    def __init__(self) -> None:
        self.counter = 0

    def __next__(self) -> int:
        number = self.counter
        self.counter += 1
        return number

    def __iter__(self) -> RequestCounter:
        return self
