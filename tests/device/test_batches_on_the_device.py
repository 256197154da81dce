"""Batches are built where the model runs: the host sends what is new and how a step cuts its tokens, and hears of tokens last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_helpers import CountedTable, Elsewhere, engine_elsewhere

from kvloom import LLM, SamplingParams
from kvloom.runtime import builder
from kvloom.runtime.device import CpuDevice
from kvloom.runtime.table import Array, HostTable
from kvloom.runtime.tables import SequenceTables, StepTensors
from kvloom.testing.checkpoints import make_checkpoint
from kvloom_kernels import gather

PROMPTS = [[1, 2, 3], [4, 5] * 20, [7] * 16]
STEPS = 20


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": STEPS, "ignore_eos": True} | values)


def tables_of(device: Elsewhere) -> list[CountedTable]:
    """Token ids and block tables of the engine of a model with one KV group."""
    return device.tables[-2:]


def test_the_host_sends_prompts_and_new_blocks_and_no_token_that_was_sampled(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_elsewhere(monkeypatch, small_checkpoint) as (llm, device):
        llm.generate(PROMPTS, params(), use_tqdm=False)
        token_ids, blocks = tables_of(device)
        assert sorted(token_ids.written) == sorted(map(len, PROMPTS))
        assert sum(blocks.written) == sum(-(-(len(p) + STEPS - 1) // 16) for p in PROMPTS)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_what_a_step_sends_beside_that_is_as_much_for_long_contexts(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    if backend == "auto":
        pytest.importorskip("triton", reason="needs triton: install kvloom[gpu]")
        from kvloom_plugins.attention import triton
        monkeypatch.setattr(triton, "paged_attention_gpu", lambda *arguments: arguments[-1])
        monkeypatch.setattr(triton, "norm_rope_write_gpu", lambda *arguments: None)
    with engine_elsewhere(monkeypatch, small_checkpoint, attention_backend=backend, enable_prefix_caching=False) as (llm, device):
        sent = []
        for prompt in ([1, 2, 3], list(range(1, 41))):
            before = len(device.sent)
            llm.generate([prompt], params(), use_tqdm=False)
            sent.append(device.sent[before:])
        assert sent[0] == sent[1]
        assert len(sent[0]) <= 2 * STEPS
        assert max(sent[0]) < 100


def test_what_kernels_read_begins_at_multiples_of_16_bytes(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a kernel once more for tensors that do not."""
    seen: list[int] = []
    gather_step = SequenceTables.gather

    def noted(self: SequenceTables, ranges: gather.Ranges, into: StepTensors) -> None:
        seen.extend(4 * numbers.storage_offset() for numbers in ranges)
        gather_step(self, ranges, into)

    monkeypatch.setattr(SequenceTables, "gather", noted)
    with engine_elsewhere(monkeypatch, small_checkpoint) as (llm, _):
        for count in (1, 2, 3):
            llm.generate([[1, 2, 3]] * count, params(max_tokens=2), use_tqdm=False)
    assert len(seen) >= 3 * 3 * 2
    assert not any(start % 16 for start in seen)


class Lies(CpuDevice):
    """Computes in sight, and tells the host of other tokens: what it computes next does not come from there."""

    is_lying = False

    def fetch(self, tensors: Any) -> list[torch.Tensor]:
        return [torch.zeros_like(t) if self.is_lying and t.dtype is torch.int64 else t for t in tensors]


def test_a_sampled_token_is_read_by_the_next_step_without_the_host(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, seen = Lies(), []
    monkeypatch.setattr(builder, "open_device", lambda name: device)
    write_each = HostTable.write_each

    def noted(self: Any, rows: Array, columns: Array, values: torch.Tensor) -> None:
        seen.append(values.tolist())
        write_each(self, rows, columns, values)

    monkeypatch.setattr(HostTable, "write_each", noted)
    with LLM(str(small_checkpoint), dtype="float32", max_model_len=64) as llm:
        true = llm.generate([[1, 2, 3]], params(), use_tqdm=False)[0].outputs[0].token_ids
        assert np.concatenate(seen).tolist() == list(true)
        seen.clear()
        device.is_lying = True
        told = llm.generate([[1, 2, 3]], params(), use_tqdm=False)[0].outputs[0].token_ids
        assert list(told) == [0] * STEPS
        assert np.concatenate(seen).tolist() == list(true)


# -- the same tokens


@contextmanager
def engine(monkeypatch: pytest.MonkeyPatch, directory: Path, is_sent: bool, **values: Any) -> Iterator[LLM]:
    """On the CPU, with tables on it, or sent to it and gathered by torch, as on a GPU."""
    with monkeypatch.context() as patch:
        if is_sent:
            patch.setattr(CpuDevice, "table", lambda self, rows, columns: CountedTable(rows, columns, self.torch_device))
            patch.setattr(gather, "problem", lambda: "as on a GPU")
        with LLM(str(directory), **{"dtype": "float32", "max_num_seqs": 4, "max_model_len": 64, "max_num_batched_tokens": 24} | values) as llm:
            yield llm


@pytest.mark.parametrize("values", [{}, {"enforce_eager": True}, {"num_gpu_blocks_override": 8}, {"block_size": 5}], ids=str)
def test_tables_that_are_sent_give_the_same_tokens(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, values: dict) -> None:
    prompts = [[1, 2, 3], [4, 5] * 15, [4, 5] * 12 + [9], [7], list(range(1, 31))]
    wanted = [params(n=2, temperature=0.8, seed=1), params(prompt_logprobs=2, logprobs=1), params(), params(max_tokens=3), params(repetition_penalty=1.3)]
    texts = []
    for is_sent in (False, True):
        with engine(monkeypatch, small_checkpoint, is_sent, **values) as llm:
            outputs = llm.generate(prompts, wanted, use_tqdm=False)
            again = llm.generate(prompts[1:3], params(), use_tqdm=False)
            texts.append([(o.prompt_logprobs, [(c.token_ids, c.logprobs) for c in o.outputs]) for o in outputs + again])
    assert texts[0] == texts[1]


def test_windows_have_tables_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path / "m", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=20, max_window_layers=1)
    found = []
    for is_sent in (False, True):
        with engine(monkeypatch, directory, is_sent, num_gpu_blocks_override=12) as llm:
            (tables,) = llm.collective_rpc(lambda worker: worker._runner._state.tables)
            assert len(tables.blocks) == 2
            found.append([o.outputs[0].token_ids for o in llm.generate([[4, 5] * 15, [3] * 22, [1]], params(max_tokens=30), use_tqdm=False)])
    assert found[0] == found[1]


def test_a_step_that_failed_is_computed_again_row_by_row(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for is_sent in (False, True):
        with engine(monkeypatch, small_checkpoint, is_sent, enable_prefix_caching=False) as llm:
            (model,) = llm.collective_rpc(lambda worker: worker.model)
            forward = model.forward
            steps = iter(range(1000))

            def sometimes(inputs: Any, ctx: Any, forward: Any = forward, steps: Any = steps) -> Any:
                if next(steps) % 4 == 1:
                    raise RuntimeError("once")
                return forward(inputs, ctx)

            model.forward = sometimes
            outputs = llm.generate(PROMPTS, params(), use_tqdm=False, on_error="return")
            found.append([o.outputs[0].token_ids for o in outputs if o.error is None])
    assert found[0] == found[1]
    assert found[0]


def test_tables_are_in_what_the_largest_step_takes(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[CountedTable]] = []

    class Measures(Elsewhere):
        def measure(self, compute: Any) -> Any:
            done = super().measure(compute)
            made.append(list(self.tables))
            return done

    with engine_elsewhere(monkeypatch, small_checkpoint, Measures()) as (llm, device):
        assert [t.tensor.shape for t in made[0]] == [t.tensor.shape for t in tables_of(device)] == [(5, 65), (5, 4)]
        (tables,) = llm.collective_rpc(lambda worker: worker._runner._state.tables)
        assert isinstance(tables, SequenceTables)
        assert tables.token_ids is tables_of(device)[0]
