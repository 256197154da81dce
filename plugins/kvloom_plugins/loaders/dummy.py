"""Weights that are made up: for tests, and for measuring speed without a download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from kvloom.errors import UnsupportedFeatureError
from kvloom.interfaces import TensorInfo, WeightLoader

STANDARD_DEVIATION = 0.02
"""The usual initializer_range of transformers configurations: activations neither vanish nor overflow over 100 layers."""


class DummyLoader(WeightLoader):
    """Whatever the model wants, as small random numbers: around 1 for norm weights, around 0 for everything else.

    A tensor's numbers depend on its name and shape alone, so two engines with one configuration agree.
    """

    needs_files = False

    def __init__(self) -> None:
        self._wanted: dict[str, TensorInfo] = {}

    def catalog(self, directory: Path, wanted: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        """What was wanted. Raises `UnsupportedFeatureError` for tensors that are not floating point (packed weights)."""
        for name, info in wanted.items():
            if not getattr(torch, info.dtype).is_floating_point:
                raise UnsupportedFeatureError("load_format", "dummy", f"{name} is {info.dtype}: use a real checkpoint")
        self._wanted = dict(wanted)
        return self._wanted

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightLoader.read`."""
        for name in names:
            yield name, _numbers(name, self._wanted[name])


def _numbers(name: str, info: TensorInfo) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    mean = 1.0 if len(info.shape) == 1 and name.endswith("weight") else 0.0
    values = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
    return values.normal_(mean, STANDARD_DEVIATION, generator=torch.Generator().manual_seed(seed))
