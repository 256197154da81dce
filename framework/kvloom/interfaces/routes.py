"""HTTP routes and the engine handle that they, executors and observers get."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvloom.outputs import RequestOutput
from kvloom.params import PoolingParams, SamplingParams


class EngineInfo(Protocol):
    """What an observer may know of a running engine."""

    @property
    def model_name(self) -> str:
        """``served_model_name``, else the checkpoint, as the configuration names it."""

    def stats(self) -> Mapping[str, float]:
        """Counters and gauges, by name with unit."""


class EngineHandle(EngineInfo, Protocol):
    """What a route may do with a running engine."""

    def add_request(self, prompt: Any, params: SamplingParams | PoolingParams, *, priority: int = 0) -> str:
        """Admit one prompt; returns the request's public id. Raises `RequestError` before anything is queued."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ids are ignored."""

    def stream(self, request_id: str) -> AsyncIterator[RequestOutput]:
        """Outputs of one request as they come; ends with a finished one."""


@dataclass(frozen=True)
class Route:
    """One HTTP route. The server adds authentication, limits and error translation: a route has no way around them."""

    method: str
    path: str
    endpoint: Callable[..., Awaitable[Any]]
    admin: bool = False


class RouteProvider(ABC):
    """Registered with ``kvloom_register_routes``; served only when the configuration names it a second time (``routes:``)."""

    @abstractmethod
    def routes(self, engine: EngineHandle) -> Sequence[Route]:
        """The routes, once at start."""
