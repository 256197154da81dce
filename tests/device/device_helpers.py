"""A device that is not the host: torch's "meta", whose numbers nobody can read. What waits for them raises, and so does what mixes
devices. It takes the place of a GPU, which tests do not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom import LLM
from kvloom.runtime import builder
from kvloom.runtime.cuda_capture import CudaCapture, GraphRecorder
from kvloom.runtime.device import ComputeDevice, FixedMemory, Measured
from kvloom.runtime.host_memory import DeviceMemory
from kvloom.runtime.table import Array, SentTable
from kvloom_kernels.requirement import Machine

GIB = 2**30


class Sent(FixedMemory):
    """Host memory, and as much that cannot be read. `sent`: the bytes of each transfer of its device."""

    def __init__(self, size_bytes: int, sent: list[int]) -> None:
        self.host = np.zeros(size_bytes, np.uint8)
        self.device = torch.zeros(size_bytes, dtype=torch.uint8, device="meta")
        self.sent = sent

    def begin(self) -> None:
        pass

    def send(self) -> None:
        self.sent.append(len(self.host))


class CountedTable(SentTable):
    """`written`: how many numbers of the host each write had."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        super().__init__(rows, columns, device)
        self.written: list[int] = []

    def write(self, row: int, start: int, values: Sequence[int] | Array) -> None:
        self.written.append(len(values))
        super().write(row, start, values)


class Graphs(GraphRecorder):
    """What a graph launches cannot be seen: it is counted."""

    def __init__(self) -> None:
        self.warmed = self.captured = self.launched = 0

    def warm_up(self, compute: Callable[[], Sequence[Tensor]]) -> None:
        self.warmed += 1
        compute()

    def capture(self, compute: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], object], Sequence[Tensor]]:
        self.captured += 1
        return self._launch, compute()

    def _launch(self) -> None:
        self.launched += 1


class Elsewhere(ComputeDevice):
    """Says of itself what a GPU says. `fetched`: the tensors of each copy to the host; what arrives is `answer`. `sent`: the bytes of
    each copy of numbers to it; those of tables are not among them. `tables`: what it remembers, an engine's after those of its largest step."""

    kind = "cuda"
    torch_device = torch.device("meta")
    is_host = False
    own_share = True
    profiles = True
    names = ("cuda", "gpu")

    def __init__(self, memory: DeviceMemory | None = None) -> None:
        self.free = memory or DeviceMemory(8 * GIB, 8 * GIB)
        self.fetched: list[list[Tensor]] = []
        self.graphs = Graphs()
        self.sent: list[int] = []
        self.tables: list[CountedTable] = []
        self.released, self.answer = 0, 1

    def describe(self) -> str:
        return "cuda:0 (a device of tests)"

    def kernels(self) -> str:
        return "kernels: torch's"

    def machine(self) -> Machine:
        return Machine("cuda", (8, 0))

    def natural_dtype(self, checkpoint: str | None) -> torch.dtype:
        return torch.bfloat16

    def memory(self) -> DeviceMemory:
        return self.free

    def release(self) -> None:
        self.released += 1

    def close(self) -> None:
        pass

    def host_bytes_per_s(self) -> float:
        return 1e10

    def measure(self, compute: Callable[[], object]) -> Measured:
        compute()
        return Measured(123 * 2**20, 0.5)

    def capture(self, step_bytes: int) -> CudaCapture:
        return CudaCapture(self.graphs)

    def captured_bytes(self, step_bytes: int) -> int:
        return 4 * step_bytes

    def scratch(self, size_bytes: int) -> None:
        return None

    def table(self, rows: int, columns: int) -> SentTable:
        self.tables.append(CountedTable(rows, columns, self.torch_device))
        return self.tables[-1]

    def fixed(self, size_bytes: int) -> FixedMemory:
        return Sent(size_bytes, self.sent)

    def put(self, array: np.ndarray[Any, Any]) -> Tensor:
        self.sent.append(array.nbytes)
        return super().put(array)

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.fetched.append(list(tensors))
        return [torch.full(t.shape, self.answer).to(t.dtype) for t in tensors]


@contextmanager
def engine_elsewhere(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, device: Elsewhere | None = None,
                     **values: Any) -> Iterator[tuple[LLM, Elsewhere]]:
    device = device or Elsewhere()
    monkeypatch.setattr(builder, "open_device", lambda name: device)
    with LLM(str(checkpoint), **{"device": "cuda", "attention_backend": "torch", "max_num_seqs": 4, "max_model_len": 64,
                                 "max_num_batched_tokens": 64} | values) as llm:
        yield llm, device

