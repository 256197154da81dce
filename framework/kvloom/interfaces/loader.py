"""Weight formats: what is in the files, and the tensors one by one. Matching names to layers is the engine's work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class TensorInfo(NamedTuple):
    """One checkpoint tensor as a file's header describes it: shape, dtype name ("float32", "bfloat16", "int32" ...), bytes."""

    shape: tuple[int, ...]
    dtype: str
    size_bytes: int


class WeightLoader(ABC):
    """One ``load_format``. Registered with ``kvloom_register_loaders``; made anew for each load, without arguments, or with
    ``model_loader_extra_config`` as an object of the ``config`` that it was registered with."""

    needs_files: bool = True
    """False when it makes its own numbers (dummy weights): `directory` then only needs a config.json."""

    @abstractmethod
    def catalog(self, directory: Path, wanted: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """Name -> info of every tensor, from headers alone; nothing of a tensor's size is allocated.

        `wanted` is what the model asks for. Raises `CheckpointError` for files that lie (sizes, ranges, overlaps), are cut
        short, or are in a format that is never loaded.
        """

    @abstractmethod
    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors named, in whatever order is best for the files; file-backed where possible, not to be kept or changed."""
