"""A whole engine whose tensors nobody can read: every operation is on the device, and the host asks once a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from device_helpers import GIB, Elsewhere, engine_elsewhere

from kvloom import SamplingParams
from kvloom.errors import MemoryPlanError, RequestFailedError, UnsupportedFeatureError
from kvloom.params import PoolingParams
from kvloom.runtime.host_memory import DeviceMemory
from kvloom.sampling_params import StructuredOutputsParams

PROMPTS = [[1, 2, 3], [4, 5] * 20, [7]]
STEPS = 5
EVERYTHING = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "logprobs": 2, "prompt_logprobs": 1, "repetition_penalty": 1.2,
    "frequency_penalty": 0.5, "logit_bias": {3: 1.0}, "min_tokens": 2, "allowed_token_ids": [1, 2, 3], "seed": 4,
}


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": STEPS, "ignore_eos": True} | values)


@pytest.fixture
def llama(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    with engine_elsewhere(monkeypatch, small_checkpoint) as both:
        yield both


@pytest.mark.parametrize("values", [{}, EVERYTHING, {"logprobs": 0}], ids=["greedy", "everything", "chosen"])
def test_a_step_asks_the_device_once(llama: tuple, values: dict) -> None:
    llm, device = llama
    outputs = llm.generate(PROMPTS, params(**values), use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [STEPS] * 3
    assert len(device.fetched) == STEPS
    assert all(t.device.type == "meta" for sent in device.fetched for t in sent)


def test_steps_run_on_the_device_whatever_the_threads_current_one_is(llama: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, device = llama
    inside: list[bool] = [False]

    @contextmanager
    def current() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    fetch = device.fetch
    monkeypatch.setattr(device, "current", current)
    monkeypatch.setattr(device, "fetch", lambda tensors: fetch(tensors) if inside[0] else pytest.fail("on another device"))
    llm.generate(PROMPTS, params(), use_tqdm=False)
    assert len(device.fetched) == STEPS


def test_rows_that_ask_for_different_things_are_still_one_question(llama: tuple) -> None:
    llm, device = llama
    wanted = [params(logprobs=1), params(**EVERYTHING), params(bad_words=["a"], temperature=1.0)]
    llm.generate(PROMPTS, wanted, use_tqdm=False)
    assert len(device.fetched) == STEPS
    assert len(device.fetched[-1]) == 2 * 3 + 2  # ids, log-probabilities and ranks for each number of candidates, then tokens and which failed


def test_a_prompt_in_chunks_asks_only_where_something_is_sampled(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_elsewhere(monkeypatch, small_checkpoint, max_num_batched_tokens=16) as (llm, device):
        llm.generate([list(range(1, 41))], params(max_tokens=1), use_tqdm=False)
        assert len(device.fetched) == 1


def test_grammars_mask_on_the_device(llama: tuple) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: install kvloom[grammars]")
    llm, device = llama
    device.answer = llm.get_tokenizer().encode("A", add_special_tokens=False)[0]
    choice = SamplingParams(temperature=0, max_tokens=2, structured_outputs=StructuredOutputsParams(regex="[!-~]*"))
    (output,) = llm.generate(["abc"], choice, use_tqdm=False)
    assert output.outputs[0].text == "AA"
    assert len(device.fetched) == 2


def test_what_waits_for_the_device_is_seen(llama: tuple) -> None:
    """The tests above can fail: a request's own function may look at numbers, and then cannot run here."""
    llm, _ = llama
    with pytest.raises(RequestFailedError, match="meta"):
        llm.generate([[1, 2]], params(logits_processors=[lambda ids, row: row * float(row.sum())]), use_tqdm=False)


def test_the_backend_dtype_and_report_are_those_of_the_device(llama: tuple) -> None:
    llm, _ = llama
    text = llm.llm_engine.report.text()
    assert "device: cuda:0 (a device of tests)" in text
    assert "dtype: bfloat16" in text
    assert "largest step" in text
    assert llm.apply_model(lambda model: {p.device.type for p in model.parameters()}) == [{"meta"}]


def test_a_plan_chooses_backends_for_the_device_that_it_is_for(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def supports(cls: type, spec: Any) -> str | None:
        seen.append(spec.device)
        return None

    from kvloom_plugins.attention.torch_batched import TorchAttention
    monkeypatch.setattr(TorchAttention, "supports", classmethod(supports))
    with engine_elsewhere(monkeypatch, small_checkpoint, num_gpu_blocks_override=9):
        assert set(seen) == {"cuda"}
        assert len(seen) == 2  # for the plan, and for the model


def test_the_cache_takes_the_share_that_is_left_by_weights_and_the_largest_step(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = 200 * 2**20
    memory = DeviceMemory(total, total - 2**20, own_bytes=2**19)
    sizes = {}
    for share in (0.7, 0.9):
        device = Elsewhere(memory)
        with engine_elsewhere(monkeypatch, small_checkpoint, device, gpu_memory_utilization=share, max_num_seqs=5000, max_num_batched_tokens=5000, enforce_eager=True) as (llm, _):
            plan = llm.llm_engine.plan
            assert plan.needs.activations_bytes == 123 * 2**20  # what was measured, not the estimate
            assert plan.budget_reason == f"gpu_memory_utilization={share} of the device, less weights and activations"
            assert plan.cache_bytes <= int(share * total) - plan.needs.weights_bytes - 123 * 2**20 < plan.cache_bytes + plan.needs.block_bytes
            sizes[share] = plan.num_blocks
    assert sizes[0.9] > sizes[0.7]


def test_what_does_not_fit_is_refused_with_the_devices_numbers(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Elsewhere(DeviceMemory(8 * GIB, 2**20, own_bytes=GIB))
    with pytest.raises(MemoryPlanError, match=r"free on the device\s+1.00 MiB  of 8.00 GiB") as caught, \
            engine_elsewhere(monkeypatch, small_checkpoint, full):
        pass
    assert "held by others" in str(caught.value)
    measured = Elsewhere(DeviceMemory(GIB, 60 * 2**20))  # enough for the estimate, too little for what the largest step took
    with pytest.raises(MemoryPlanError, match=r"activations\s+123.00 MiB"), \
            engine_elsewhere(monkeypatch, small_checkpoint, measured, enforce_eager=True):
        pass


def test_recorded_steps_are_planned_for(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for eager in (True, False):
        with engine_elsewhere(monkeypatch, small_checkpoint, enforce_eager=eager) as (llm, _):
            assert (llm.llm_engine.plan.needs.recorded_bytes == 0) is eager
            assert ("recorded steps" in llm.llm_engine.plan.table()) is not eager


def test_blocks_that_give_way_go_to_the_host(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_elsewhere(monkeypatch, small_checkpoint, swap_space=0.25) as (llm, _):
        (tier,) = llm.collective_rpc(lambda worker: worker._host_tier())
        assert tier.num_blocks == 2**28 // llm.llm_engine.plan.needs.block_bytes
        assert tier.bytes_per_s == 1e10
        assert tier.tokens_per_s == 64 / 0.5  # of the largest step
        assert not any("swap_space" in note for note in llm.llm_engine.config.notes)


def test_sleep_gives_the_devices_memory_back(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_elsewhere(monkeypatch, small_checkpoint, enable_sleep_mode=True) as (llm, device):
        llm.sleep(level=2)
        assert device.released == 1
        device.free = DeviceMemory(8 * GIB, 2**20)
        with pytest.raises(MemoryPlanError, match="free on the device"):
            llm.wake_up()
        device.free = DeviceMemory(8 * GIB, 8 * GIB)
        assert llm.wake_up()
        assert len(llm.generate(PROMPTS, params(), use_tqdm=False)) == 3


def test_memory_that_others_took_meanwhile_is_a_plan_error(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvloom.runtime import worker

    def taken(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with engine_elsewhere(monkeypatch, small_checkpoint, enable_sleep_mode=True) as (llm, _):
        llm.sleep(level=2)
        with monkeypatch.context() as patch:
            patch.setattr(worker, "allocate", taken)
            with pytest.raises(MemoryPlanError, match=r"others took it meanwhile.*2.00 GiB"):
                llm.wake_up()
        assert llm.wake_up()


def test_a_largest_step_that_does_not_fit_is_a_plan_error(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Elsewhere()

    def measure(compute: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(device, "measure", measure)
    with pytest.raises(MemoryPlanError, match=r"lower max_num_batched_tokens.*2.00 GiB"), \
            engine_elsewhere(monkeypatch, small_checkpoint, device):
        pass


@pytest.mark.parametrize("name", ["cuda", "GPU"])
def test_the_prefix_cache_is_asked_for_by_the_devices_names(llama: tuple, name: str) -> None:
    llm, _ = llama
    assert llm.reset_prefix_cache(name)
    with pytest.raises(UnsupportedFeatureError, match="'cuda'; leave it out"):
        llm.reset_prefix_cache("cpu")


def test_embeddings_come_in_one_copy(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_elsewhere(monkeypatch, small_checkpoint, task="embed") as (llm, device):
        outputs = llm.embed(PROMPTS, pooling_params=[PoolingParams(), PoolingParams(dimensions=None), PoolingParams(use_activation=False)], use_tqdm=False)
        assert len(outputs) == 3
        assert len(device.fetched) == 1
        assert len(device.fetched[0]) == 2  # those that want the same together
