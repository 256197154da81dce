"""Where a model runs: everything that depends on the kind of device is asked here, and chosen once, by `open_device`."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import ConfigError
from kvloom.runtime.capture import Capture, PlanCapture
from kvloom.runtime.host_memory import DeviceMemory, host_memory, release_freed, trim_heap
from kvloom.runtime.table import HostTable, Table
from kvloom_kernels import native
from kvloom_kernels.linear import product_kind
from kvloom_kernels.requirement import Machine
from kvloom_kernels.scratch import Arena
from kvloom_kernels.transfer import to_device


class Measured(NamedTuple):
    """What a computation took: bytes of the device's memory at its peak beyond those that were held before, and seconds."""

    peak_bytes: int
    seconds: float


class FixedMemory(ABC):
    """Memory at one address on the device, and what is written there from the host.

    Attributes:
        host: ``[size]`` uint8, to be written to.
        device: ``[size]`` uint8 on the device; on the host itself the same memory.
    """

    host: np.ndarray[Any, Any]
    device: Tensor

    @abstractmethod
    def begin(self) -> None:
        """Before `host` is written to again."""

    @abstractmethod
    def send(self) -> None:
        """Make the bytes of `device` those of `host`, in the order of the device's work."""


class Fixed(NamedTuple):
    """One array of a `FixedMemory`, int32: as the host writes it, and as the device reads it."""

    host: np.ndarray[Any, Any]
    device: Tensor


ALIGNED_NUMBERS = 4
"""Of int32, after which another array may begin: Triton compiles a kernel once more for tensors that are not aligned to 16 bytes."""


class ComputeDevice(ABC):
    """One device.

    Attributes:
        kind: "cpu" or "cuda".
        torch_device: where its tensors are.
        is_host: whether its memory is the host's.
        own_share: whether an engine takes ``gpu_memory_utilization`` of it; else a bounded part of what is free.
        profiles: whether a step's peak is measured before the KV cache is made; else it is estimated.
        names: what callers call it.
    """

    kind: str
    torch_device: torch.device
    is_host: bool
    own_share: bool
    profiles: bool
    names: tuple[str, ...]

    @abstractmethod
    def describe(self) -> str:
        """For the start report."""

    @abstractmethod
    def kernels(self) -> str:
        """Make kernels ready where that takes time; what the start report says about them."""

    @abstractmethod
    def machine(self) -> Machine:
        """What components may need of it."""

    @abstractmethod
    def natural_dtype(self, checkpoint: str | None) -> torch.dtype:
        """What ``dtype="auto"`` means for a checkpoint of this dtype."""

    @abstractmethod
    def memory(self) -> DeviceMemory:
        """What there is, what is free, and what this process holds."""

    @abstractmethod
    def release(self) -> None:
        """Hand memory back that was freed."""

    @abstractmethod
    def close(self) -> None:
        """The same when an engine ends, where there is no time to look for what nobody refers to."""

    @abstractmethod
    def host_bytes_per_s(self) -> float:
        """Measure the way between host and device. Not called where `is_host`."""

    @abstractmethod
    def measure(self, compute: Callable[[], object]) -> Measured:
        """Run `compute` and wait for it."""

    @abstractmethod
    def capture(self, step_bytes: int) -> Capture:
        """How it repeats steps.

        Args:
            step_bytes: what the largest of them takes, with its results.
        """

    def range_capture(self, step_bytes: int) -> PlanCapture | None:
        """How it repeats steps whose tokens are cut into other ranges each time; None where it cannot.

        Args:
            step_bytes: what the largest of them takes.
        """
        return None

    @abstractmethod
    def captured_bytes(self, step_bytes: int) -> int:
        """Memory to plan for captured steps, beside what a step that is not captured takes."""

    @abstractmethod
    def scratch(self, size_bytes: int) -> Arena | None:
        """Memory for what kernels compute within a step; None where torch's allocator does not have to wait for fresh pages."""

    @abstractmethod
    def table(self, rows: int, columns: int) -> Table:
        """What it remembers of sequences."""

    @abstractmethod
    def fixed(self, size_bytes: int) -> FixedMemory:
        """Memory for inputs of captured steps, zeroed."""

    @abstractmethod
    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Bring results to the host, in one copy: a step does it once, and waits for the device nowhere else."""

    def current(self) -> AbstractContextManager[object]:
        """Within it kernels are launched on this device, whatever the thread's current one is."""
        return nullcontext()

    def put(self, array: np.ndarray[Any, Any]) -> Tensor:
        """Numbers of the host on the device, without waiting; on the host itself the array's own memory."""
        return to_device(array, self.torch_device)


def aligned(count: int) -> int:
    """So many int32 numbers, or a few more, at whose end another array may begin."""
    return -(-count // ALIGNED_NUMBERS) * ALIGNED_NUMBERS


def fixed_arrays(device: ComputeDevice, sizes: Sequence[int]) -> tuple[FixedMemory, list[Fixed]]:
    """Arrays of int32 one after the other in one `FixedMemory`, zeroed."""
    starts = np.cumsum([0, *map(aligned, sizes)]).tolist()
    memory = device.fixed(starts[-1] * np.dtype(np.int32).itemsize)
    host, on_device = memory.host.view(np.int32), memory.device.view(torch.int32)
    return memory, [Fixed(host[start:start + size], on_device[start:start + size]) for start, size in zip(starts, sizes, strict=False)]


class SharedMemory(FixedMemory):
    """`FixedMemory` where the device is the host."""

    def __init__(self, size_bytes: int) -> None:
        self.host = np.zeros(size_bytes, np.uint8)
        self.device = torch.from_numpy(self.host)

    def begin(self) -> None:
        """See `FixedMemory.begin`."""

    def send(self) -> None:
        """See `FixedMemory.send`: it is there."""


class CpuDevice(ComputeDevice):
    """The host's CPU, with our C++ kernels where they can be compiled."""

    kind = "cpu"
    torch_device = torch.device("cpu")
    is_host = True
    own_share = False
    profiles = False
    names = ("cpu",)

    def describe(self) -> str:
        """See `ComputeDevice.describe`."""
        return "cpu"

    def kernels(self) -> str:
        """Compile or load the C++ kernels."""
        reason = native.problem()
        return f"kernels: {'C++' if reason is None else f'torch ({reason})'}; bfloat16 products: {product_kind()}"

    def machine(self) -> Machine:
        """See `ComputeDevice.machine`."""
        return Machine("cpu")

    def natural_dtype(self, checkpoint: str | None) -> torch.dtype:
        """A bfloat16 checkpoint stays bfloat16, every other one runs in bfloat16 only where the CPU multiplies it natively, else in
        float32."""
        return torch.bfloat16 if checkpoint == "bfloat16" or product_kind() != "widened" else torch.float32

    def memory(self) -> DeviceMemory:
        """See `host_memory`."""
        return host_memory()

    def release(self) -> None:
        """See `release_freed`."""
        release_freed()

    def close(self) -> None:
        """See `trim_heap`."""
        trim_heap()

    def host_bytes_per_s(self) -> float:
        """Without bound: nothing has to be moved."""
        return float("inf")

    def measure(self, compute: Callable[[], object]) -> Measured:
        """See `ComputeDevice.measure`; a process's peak cannot be set back, so 0 is said of it."""
        began_s = time.perf_counter()
        compute()
        return Measured(0, time.perf_counter() - began_s)

    def capture(self, step_bytes: int) -> Capture:
        """See `ComputeDevice.capture`."""
        return self._plan_capture(step_bytes)

    def range_capture(self, step_bytes: int) -> PlanCapture | None:
        """See `ComputeDevice.range_capture`."""
        return self._plan_capture(step_bytes)

    def _plan_capture(self, step_bytes: int) -> PlanCapture:
        arena = Arena(step_bytes)
        arena.touch()
        return PlanCapture(arena)

    def captured_bytes(self, step_bytes: int) -> int:
        """None: a step is either captured or not, and what is planned for one serves the other."""
        return 0

    def scratch(self, size_bytes: int) -> Arena | None:
        """See `ComputeDevice.scratch`."""
        return Arena(size_bytes)

    def table(self, rows: int, columns: int) -> Table:
        """See `ComputeDevice.table`."""
        return HostTable(rows, columns)

    def fixed(self, size_bytes: int) -> FixedMemory:
        """See `ComputeDevice.fixed`."""
        return SharedMemory(size_bytes)

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """They are there."""
        return list(tensors)


def open_device(name: str) -> ComputeDevice:
    """The device that ``device=`` names; "auto" is a GPU where torch can use one, else the CPU.

    Raises:
        ConfigError: there is no such device here, with torch's reason.
    """
    from kvloom.runtime.cuda import CudaDevice, cuda_problem  # it needs what is above

    if name == "cpu":
        return CpuDevice()
    problem = cuda_problem()
    if problem is None:
        return CudaDevice(torch.cuda.current_device())
    if name == "auto":
        return CpuDevice()
    raise ConfigError(f"device={name!r} cannot be used here: {problem}. Or use device='cpu'")
