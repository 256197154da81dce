"""Decode steps as CUDA graphs: the contract of `Capture`, with graphs that tests can look into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from device_helpers import engine_elsewhere
from torch import Tensor

from kvloom import SamplingParams
from kvloom.runtime.cuda_capture import CudaCapture, GraphRecorder
from kvloom_kernels.plan import NotRecordableError

Compute = Callable[[], Sequence[Tensor]]


class Again(GraphRecorder):
    """A graph that computes again, into the memory of its results: what a CUDA graph does to who looks at it from outside."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def warm_up(self, compute: Compute) -> None:
        self.log.append("warm up")
        compute()

    def capture(self, compute: Compute) -> tuple[Callable[[], object], Sequence[Tensor]]:
        self.log.append("capture")
        memory = [torch.full_like(r, torch.nan) for r in compute()]  # capturing computes nothing

        def launch() -> None:
            self.log.append("launch")
            for to, result in zip(memory, compute(), strict=True):
                to.copy_(result)

        return launch, memory


class Refuses(Again):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def capture(self, compute: Compute) -> Any:
        raise self._error


def test_a_graph_is_warmed_up_captured_and_launched_for_its_first_step_too() -> None:
    recorder, x = Again(), torch.arange(4.0)[:, None]
    replay, (out,) = CudaCapture(recorder).record(lambda: (x * 2,), 4)
    assert recorder.log == ["warm up", "capture", "launch"]
    assert out[:, 0].tolist() == [0, 2, 4, 6]
    x += 1
    replay(2)
    assert out[:, 0].tolist()[:2] == [2, 4]
    assert recorder.log[3:] == ["launch"]


def test_sizes_are_close_few_and_never_more_than_there_may_be() -> None:
    capture, most = CudaCapture(Again()), 200
    sizes = {rows: capture.size(rows, (), most) for rows in range(1, most + 1)}
    assert all(rows <= size <= min(most, rows * 3 / 2) for rows, size in sizes.items())
    assert sorted(set(sizes.values())) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 200]
    assert sum(set(sizes.values())) < 4.5 * most
    assert capture.size(3, (8,), most) == 3  # a graph computes all its rows: a larger one is not taken instead


@pytest.mark.parametrize(("compute", "reason"), [
    (lambda: (torch.ones(2) * torch.ones(()).item(),), "waits for the device \\(_local_scalar_dense\\)"),
    (lambda: (torch.ones(2) * float(torch.ones(3).sum()),), "waits for the device \\(_local_scalar_dense\\)"),
    (lambda: (torch.ones(2).nonzero(),), "waits for the device \\(nonzero\\)"),
    (lambda: (torch.ones(2)[torch.ones(2, dtype=torch.bool)],), "waits for the device"),
    (lambda: (torch.ones(2).to("meta"),), "between the device and the host \\(_to_copy\\)"),
    (lambda: (torch.empty(2, device="meta").copy_(torch.ones(2)),), "between the device and the host \\(copy_\\)"),
    (lambda: (torch.ones(3),), "no rows of the step"),
])
@pytest.mark.parametrize("inference", [True, False])  # in which torch hands operations over whole, as steps do, or as their parts
def test_what_would_see_the_numbers_of_the_recording_is_not_recorded(compute: Compute, reason: str, inference: bool) -> None:
    with torch.inference_mode(inference), pytest.raises(NotRecordableError, match=reason):
        CudaCapture(Again()).record(compute, 2)


def test_what_cuda_refuses_to_capture_is_said_and_no_memory_is_an_error() -> None:
    with pytest.raises(NotRecordableError, match="cannot be captured: operation not permitted when stream is capturing$"):
        CudaCapture(Refuses(RuntimeError("operation not permitted when stream is capturing\nmore"))).record(lambda: (torch.ones(2),), 2)
    with pytest.raises(torch.OutOfMemoryError):
        CudaCapture(Refuses(torch.OutOfMemoryError("CUDA out of memory"))).record(lambda: (torch.ones(2),), 2)


# -- in an engine


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments of the Triton backend's attention, which launches nothing."""
    pytest.importorskip("triton", reason="needs triton: install kvloom[gpu]")
    from kvloom_plugins.attention import triton

    seen: list[Any] = []

    def attend(*arguments: Any) -> Tensor:
        seen.append(arguments)
        return arguments[-1]

    monkeypatch.setattr(triton, "paged_attention_gpu", attend)
    monkeypatch.setattr(triton, "norm_rope_write_gpu", lambda *arguments: None)
    return seen


def generate(llm: Any, rows: int, steps: int = 5) -> None:
    prompts = [{"prompt_token_ids": [3 + i, 4, 5]} for i in range(rows)]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True), use_tqdm=False)


def test_decode_steps_are_captured_once_and_launched(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, launches: list) -> None:
    with engine_elsewhere(monkeypatch, small_checkpoint, attention_backend="auto") as (llm, device):
        assert "attention backend: triton" in llm.llm_engine.report.text()
        generate(llm, 3)
        assert (device.graphs.warmed, device.graphs.captured, device.graphs.launched) == (1, 1, 4)
        assert len(device.fetched) == 5  # one a step, the prompts' included
        assert device.sent[-4:] == [16 + 32 + 16] * 4  # rows, where they start, contexts: one copy of few bytes
        before = len(launches)
        generate(llm, 3)
        assert (device.graphs.captured, device.graphs.launched) == (1, 8)
        assert len(launches) == before + 2  # layers of the prompts' step: the others are launched as graphs
        generate(llm, 1)
        assert device.graphs.captured == 2


def test_splits_are_those_of_the_longest_context_that_may_come(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, launches: list) -> None:
    from kvloom_kernels.gpu.attention import split_count

    with engine_elsewhere(monkeypatch, small_checkpoint, attention_backend="auto", max_model_len=512, max_num_batched_tokens=512) as (llm, _):
        generate(llm, 1, steps=2)
        *_, max_query_tokens, splits, _out = launches[-1]
        assert max_query_tokens == 1
        assert splits == split_count(2, 512) > split_count(2, 5)


@pytest.mark.parametrize("values", [{"enforce_eager": True}, {"attention_backend": "torch"}, {"cpu_offload_gb": 0.001}], ids=str)
def test_what_cannot_be_captured_runs_call_by_call(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, launches: list, values: dict) -> None:
    if "cpu_offload_gb" in values:  # weights come and go by hooks
        monkeypatch.setattr("kvloom.runtime.offload.HostWeights", Stays)
    with engine_elsewhere(monkeypatch, small_checkpoint, **{"attention_backend": "auto"} | values) as (llm, device):
        generate(llm, 2)
        assert device.graphs.captured == 0
        assert len(device.fetched) == 5


class Stays:
    """Weights that cannot be copied from where nobody can read them."""

    size_bytes = 0

    def __init__(self, parameters: Any, device: torch.device) -> None:
        pass

    def fetch(self) -> None:
        pass

    drop = fetch


def test_a_function_that_looked_at_the_model_makes_it_capture_again(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch,
                                                                    launches: list) -> None:
    with engine_elsewhere(monkeypatch, small_checkpoint, attention_backend="auto") as (llm, device):
        generate(llm, 2)
        llm.apply_model(lambda model: None)
        generate(llm, 2)
        assert device.graphs.captured == 2
