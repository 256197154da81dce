"""What is asked of a GPU, with torch's answers made up: there is none in tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom import LLM
from kvloom.errors import ConfigError
from kvloom.runtime.cuda import CudaDevice, allocator_memory, cuda_problem
from kvloom.runtime.device import CpuDevice, open_device
from kvloom_kernels.transfer import packed, to_device, to_host, unpacked

ROOT = Path(__file__).resolve().parents[2]
MIB, GIB = 2**20, 2**30


# -- which device


def raising(error: Exception) -> Any:
    def init() -> None:
        raise error

    return init


@pytest.mark.parametrize(("cuda", "init", "says"), [
    (None, raising(AssertionError("not called")), "was built without CUDA: install a build that has it"),
    ("13.0", raising(RuntimeError("Found no NVIDIA driver on your system")), "says: Found no NVIDIA driver on your system"),
    ("13.0", lambda: None, "sees no GPU: is one there, and does CUDA_VISIBLE_DEVICES name it"),
])
def test_no_gpu_is_refused_before_anything_is_read_with_torchs_reason(monkeypatch: pytest.MonkeyPatch, cuda: str | None, init: Any,
                                                                      says: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError, match=f"device='cuda' cannot be used here: .*{says}.*use device='cpu'"):
        LLM("/nowhere", device="cuda")
    assert isinstance(open_device("auto"), CpuDevice)
    assert isinstance(open_device("cpu"), CpuDevice)


def test_auto_takes_the_gpu_that_torch_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert cuda_problem() is None
    for name in ("auto", "cuda"):
        device = open_device(name)
        assert isinstance(device, CudaDevice)
        assert device.torch_device == torch.device("cuda", 1)
        assert not device.is_host
    assert isinstance(open_device("cpu"), CpuDevice)


@pytest.mark.parametrize(("capability", "checkpoint", "dtype"), [
    ((9, 0), "bfloat16", torch.bfloat16), ((9, 0), "float32", torch.bfloat16), ((9, 0), None, torch.bfloat16), ((9, 0), "float16", torch.float16),
    ((7, 5), "bfloat16", torch.float16), ((7, 5), "float16", torch.float16),
])
def test_half_precision_is_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch, capability: tuple, checkpoint: str | None, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert CudaDevice(0).natural_dtype(checkpoint) is dtype
    assert CudaDevice(0).machine().capability == capability


# -- memory


class Allocator:
    """A GPU's memory as the driver and torch tell it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.others = 3 * GIB
        self.reserved = self.allocated = self.peak = 0
        for name in ("mem_get_info", "memory_stats", "memory_allocated", "memory_reserved", "max_memory_reserved", "reset_peak_memory_stats"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        patch.setattr(torch.cuda, "empty_cache", self.empty_cache)

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return 80 * GIB - self.others - self.reserved, 80 * GIB

    def memory_stats(self, device: Any) -> dict[str, int]:
        return {"reserved_bytes.all.current": self.reserved, "allocated_bytes.all.current": self.allocated}

    def memory_allocated(self, device: Any) -> int:
        return self.allocated

    def memory_reserved(self, device: Any) -> int:
        return self.reserved

    def max_memory_reserved(self, device: Any) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device: Any) -> None:
        self.peak = self.reserved

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def take(self, size_bytes: int) -> None:
        """And give it back: the allocator keeps it."""
        self.reserved = max(self.reserved, self.allocated + size_bytes)
        self.peak = max(self.peak, self.reserved)


def test_only_what_this_processs_tensors_take_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Allocator(monkeypatch)
    gpu.reserved, gpu.allocated = 5 * GIB, 2 * GIB
    memory = CudaDevice(0).memory()
    assert (memory.total_bytes, memory.own_bytes) == (80 * GIB, 2 * GIB)
    assert memory.free_bytes == 75 * GIB  # what the allocator keeps is free to who asks it
    assert memory.held_by_others_bytes == 3 * GIB
    assert allocator_memory(GIB, 2 * GIB, {}).free_bytes == GIB  # before the first tensor there are no statistics


def test_a_measured_step_is_its_peak_and_what_its_first_run_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Allocator(monkeypatch)
    gpu.reserved = gpu.allocated = 10 * GIB  # weights
    runs = []

    def step() -> None:
        if not runs:
            gpu.others += 200 * MIB  # code of kernels
        runs.append(gpu.take(700 * MIB))

    measured = CudaDevice(0).measure(step)
    assert measured.peak_bytes == 900 * MIB
    assert len(runs) == 2
    assert measured.seconds > 0
    assert gpu.reserved == gpu.allocated == 10 * GIB  # and nothing is kept


# -- between host and device


@given(st.lists(st.tuples(st.sampled_from([torch.int64, torch.float32, torch.bool, torch.bfloat16, torch.int32]),
                          st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6))
def test_results_are_packed_into_one_copy_and_cut_from_it(parts: list) -> None:
    tensors = [torch.randint(0, 2, shape).to(dtype) for dtype, shape in parts]
    bytes_ = packed(tensors)
    assert bytes_.dtype is torch.uint8
    for got, given_ in zip(unpacked(bytes_, tensors), tensors, strict=True):
        assert got.dtype is given_.dtype
        assert torch.equal(got, given_)


def test_on_the_host_nothing_is_copied() -> None:
    x = torch.ones(3)
    assert to_host([x])[0] is x
    numbers = x.numpy()
    assert to_device(numbers, torch.device("cpu")).data_ptr() == x.data_ptr()
    memory = CpuDevice().fixed(8)
    memory.host[3] = 7
    memory.send()
    assert memory.device.tolist() == [0, 0, 0, 7, 0, 0, 0, 0]


# -- who knows of it

KNOW = {
    "framework/kvloom/runtime/cuda.py", "framework/kvloom/runtime/cuda_capture.py", "framework/kvloom/runtime/device.py",
    "framework/kvloom/runtime/choice.py",  # which backends are tried, as data
    "framework/kvloom/runtime/host_blocks.py", "kernels/kvloom_kernels/transfer.py",  # pinned memory
    "framework/kvloom/config/device.py", "framework/kvloom/config/cache.py",  # names of the configuration
    "framework/kvloom/interfaces/attention.py", "plugins/kvloom_plugins/attention/plugin.py",  # docs, and what a backend needs
}


def test_the_kind_of_device_is_asked_in_few_places() -> None:
    packages = ("framework", "kernels", "plugins", "builtin_models", "builtin_quant", "builtin_samplers")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 150
    asking = {str(path.relative_to(ROOT)) for path in files if re.search(r"torch\.cuda|\"cuda\"|'cuda'", path.read_text())}
    assert asking == KNOW
