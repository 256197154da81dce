"""Adapters (LoRA, soft prompts): read a file, attach to layers, add a delta to a step's rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class AdaptableLayer(Protocol):
    """A layer as an adapter sees it: the delta comes after the product, before the collective, and shards with the layer."""

    prefix: str
    in_features: int
    shards: tuple[tuple[str | None, int], ...]
    sharded_axis: str | None


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """Which modules of the file were applied and which were not. Zero or partial application is an error unless allowed."""

    applied: tuple[str, ...]
    not_applied: tuple[str, ...]
    size_bytes: int


class AdapterBatch(ABC):
    """Adapters of one step's rows, bound once per step; T tokens."""

    @abstractmethod
    def add_delta(self, prefix: str, x: Tensor, y: Tensor) -> Tensor:
        """``y [T, out] += delta(x [T, in])`` for the rows that have an adapter on layer `prefix`; returns y."""


class Adapter(ABC):
    """One kind of adapter. Registered with ``kvloom_register_adapters``.

    Identity is the SHA-256 of the files, never a client's name or number; it is part of the prefix-cache key.
    """

    @abstractmethod
    def read(self, path: Path) -> Any:
        """Read and check the files (safetensors only) without touching the model. Raises `CheckpointError`."""

    @abstractmethod
    def attach(self, weights: Any, layers: Mapping[str, AdaptableLayer], rank: int, size: int) -> AdapterReport:
        """Put this rank's part on the device. Called between steps."""

    @abstractmethod
    def detach(self, content_hash: str) -> None:
        """Free an adapter that no running sequence uses."""

    @abstractmethod
    def batch(self, token_counts: Mapping[str, int]) -> AdapterBatch:
        """Bind a step: tokens per adapter hash in row order ("" for rows without one)."""

    def virtual_tokens(self, weights: Any) -> Tensor | None:
        """Soft prompts only: embeddings ``[n, H]`` put before the prompt."""
        return None
