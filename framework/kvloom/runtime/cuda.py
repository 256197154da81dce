"""A GPU of NVIDIA, through torch's allocator and streams."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec

import torch
from torch import Tensor

from kvloom.runtime.capture import Capture
from kvloom.runtime.cuda_capture import CudaCapture, TorchGraphs
from kvloom.runtime.device import ComputeDevice, FixedMemory, Measured
from kvloom.runtime.host_memory import DeviceMemory, release_freed
from kvloom.runtime.table import SentTable, Table
from kvloom_kernels.requirement import Machine
from kvloom_kernels.scratch import Arena
from kvloom_kernels.transfer import to_host

LINK_BYTES = 64 * 2**20
"""That are copied to measure the way to the host."""
CAPTURED_STEPS = 6
"""Steps of the largest size whose memory captured ones are planned with: one runs before it is captured, on a stream of its own, one is
the pool's, and results of the smaller sizes stay, which are less than 3.5 times the largest's (`CudaCapture.size`). Not measured."""
BF16_CAPABILITY = (8, 0)


def cuda_problem() -> str | None:
    """None when torch can use a GPU here; else the reason, as a phrase."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a build that has it"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f"torch {torch.__version__} says: {error}"
    return f"torch {torch.__version__} sees no GPU: is one there, and does CUDA_VISIBLE_DEVICES name it?"


def allocator_memory(free_bytes: int, total_bytes: int, stats: Mapping[str, int]) -> DeviceMemory:
    """From what the driver says and ``torch.cuda.memory_stats``: what torch's allocator keeps for later is free to this process, and
    only what its tensors take is its own."""
    reserved, allocated = (stats.get(f"{kind}_bytes.all.current", 0) for kind in ("reserved", "allocated"))
    return DeviceMemory(total_bytes, free_bytes + reserved - allocated, allocated)


class CudaDevice(ComputeDevice):
    """One GPU.

    Args:
        index: as torch counts them.
    """

    kind = "cuda"
    is_host = False
    own_share = True
    profiles = True
    names = ("cuda", "gpu")

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)

    def current(self) -> AbstractContextManager[object]:
        """See `ComputeDevice.current`: Triton launches on the thread's current device."""
        return torch.cuda.device(self.torch_device)

    def describe(self) -> str:
        """See `ComputeDevice.describe`."""
        properties = torch.cuda.get_device_properties(self.torch_device)
        return (f"{self.torch_device} ({properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.total_memory / 2**30:.1f} GiB)")

    def kernels(self) -> str:
        """See `ComputeDevice.kernels`."""
        return "kernels: " + ("torch's and ours in Triton" if find_spec("triton") else "torch's (triton is not installed)")

    def machine(self) -> Machine:
        """See `ComputeDevice.machine`."""
        return Machine("cuda", torch.cuda.get_device_capability(self.torch_device))

    def natural_dtype(self, checkpoint: str | None) -> torch.dtype:
        """A checkpoint in half precision stays as it is; every other one runs in bfloat16, or float16 on a GPU that has no bfloat16."""
        has_bf16 = torch.cuda.get_device_capability(self.torch_device) >= BF16_CAPABILITY
        return torch.bfloat16 if has_bf16 and checkpoint != "float16" else torch.float16

    def memory(self) -> DeviceMemory:
        """See `allocator_memory`. The driver's context counts as others'."""
        return allocator_memory(*torch.cuda.mem_get_info(self.torch_device), torch.cuda.memory_stats(self.torch_device))

    def release(self) -> None:
        """See `ComputeDevice.release`."""
        release_freed()
        torch.cuda.empty_cache()

    def close(self) -> None:
        """See `ComputeDevice.close`: other processes may need it."""
        self.release()

    def host_bytes_per_s(self) -> float:
        """The slower of the two ways, from and to pinned memory."""
        host = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(LINK_BYTES, dtype=torch.uint8, device=self.torch_device)
        return LINK_BYTES / max(self._copy_s(device, host), self._copy_s(host, device))

    def _copy_s(self, to: Tensor, source: Tensor) -> float:
        to.copy_(source, non_blocking=True)
        torch.cuda.synchronize(self.torch_device)
        began_s = time.perf_counter()
        to.copy_(source, non_blocking=True)
        torch.cuda.synchronize(self.torch_device)
        return time.perf_counter() - began_s

    def measure(self, compute: Callable[[], object]) -> Measured:
        """See `ComputeDevice.measure`. It runs twice: the first time compiles and loads kernels, whose memory stays and is counted."""
        outside_bytes = self._outside_bytes()
        compute()
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()
        outside_bytes = max(0, self._outside_bytes() - outside_bytes)
        held_bytes = torch.cuda.memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        began_s = time.perf_counter()
        compute()
        torch.cuda.synchronize(self.torch_device)
        seconds = time.perf_counter() - began_s
        # Reserved, not allocated: the pieces between tensors are taken, too.
        peak_bytes = torch.cuda.max_memory_reserved(self.torch_device) - held_bytes
        torch.cuda.empty_cache()
        return Measured(outside_bytes + peak_bytes, seconds)

    def _outside_bytes(self) -> int:
        """Of the device, in use but not by torch's allocator: code of kernels, libraries' workspaces, other processes."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.torch_device)
        return int(total_bytes - free_bytes - torch.cuda.memory_reserved(self.torch_device))

    def capture(self, step_bytes: int) -> Capture:
        """See `ComputeDevice.capture`."""
        return CudaCapture(TorchGraphs(self.torch_device))

    def captured_bytes(self, step_bytes: int) -> int:
        """See `CAPTURED_STEPS`."""
        return CAPTURED_STEPS * step_bytes

    def scratch(self, size_bytes: int) -> Arena | None:
        """None: torch's allocator hands memory of the device out again without waiting."""
        return None

    def table(self, rows: int, columns: int) -> Table:
        """See `ComputeDevice.table`."""
        return SentTable(rows, columns, self.torch_device)

    def fixed(self, size_bytes: int) -> FixedMemory:
        """See `ComputeDevice.fixed`."""
        return PinnedMemory(size_bytes, self.torch_device)

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `ComputeDevice.fetch`."""
        return to_host(tensors)


class PinnedMemory(FixedMemory):
    """`FixedMemory` of a GPU: pinned memory of the host, and as much on the device."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self._pinned = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=True)
        self.host = self._pinned.numpy()
        self.device = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
        self._read = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Wait until the device has read what was sent last: it has, unless a step raised after that."""
        self._read.synchronize()

    def send(self) -> None:
        """See `FixedMemory.send`."""
        self.device.copy_(self._pinned, non_blocking=True)
        self._read.record()
