"""Decode steps that are recorded and repeated: the same numbers as call by call, and no repeating of what cannot be repeated."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from replays import assert_repeated, replayed

from kvloom import LLM, SamplingParams
from kvloom.interfaces import AttentionBatch
from kvloom.runtime.capture import PlanCapture
from kvloom.testing.checkpoints import make_checkpoint
from kvloom_kernels.attention import Scores
from kvloom_kernels.norm import rms_norm
from kvloom_kernels.plan import NotRecordableError
from kvloom_kernels.scratch import Arena, empty
from kvloom_kernels.token_attention import token_attention
from kvloom_plugins.attention.cpu import CpuAttention
from kvloom_plugins.attention.paged import PagedMeta

PROMPTS = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (5, 9, 2, 30, 4, 11, 7, 3, 3, 1, 40)]
LENGTHS = (3, 8, 20, 5, 6, 7, 8, 12, 3, 1, 30)
GAIN = torch.ones(16)
STARTS = torch.arange(5, dtype=torch.int32)


def params(**values: Any) -> list[SamplingParams]:
    return [SamplingParams(**({"temperature": 0, "max_tokens": n, "ignore_eos": True, "logprobs": 2} | values)) for n in LENGTHS]


def written(llm: LLM, given: list[SamplingParams] | None = None) -> list[Any]:
    """Tokens and log-probabilities, to the last bit."""
    outputs = llm.generate(PROMPTS, given or params(), use_tqdm=False)
    return [(o.outputs[0].token_ids, [[(i, p.logprob) for i, p in position.items()] for position in o.outputs[0].logprobs])
            for o in outputs]


class TimesOne(torch.nn.Module):
    """A norm of somebody who computes with torch."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, stream = self.norm.add(x, residual)
        return normed * 1.0, stream


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_enforce_eager__runs_call_by_call_with_the_numbers_of_recorded_steps(
        small_checkpoint: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"dtype": dtype, "max_num_seqs": 6, "max_num_batched_tokens": 32}
    with LLM(str(small_checkpoint), enforce_eager=True, **values) as llm, replayed(monkeypatch) as seen:
        expected = [written(llm), written(llm, params(temperature=1.0, seed=3, top_p=0.9, min_tokens=1))]
        assert not seen
    with LLM(str(small_checkpoint), **values) as llm, replayed(monkeypatch) as seen:
        assert [written(llm), written(llm, params(temperature=1.0, seed=3, top_p=0.9, min_tokens=1))] == expected
        assert {1, 2, 3} <= set(seen.decode)
        assert_repeated(seen)


def test_layers_with_windows_and_others_are_recorded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_checkpoint(tmp_path / "m", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    values = {"dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 32}
    with LLM(str(directory), enforce_eager=True, **values) as llm:
        expected = written(llm)
    with LLM(str(directory), **values) as llm, replayed(monkeypatch) as seen:
        assert written(llm) == expected
        assert_repeated(seen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_strangers_model_of_our_layers_is_recorded_with_the_numbers_of_call_by_call(
        install, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme", {"acme-models": Path(__file__).with_name("sandwich_model.py").read_text()})
    directory = make_checkpoint(tmp_path / "m", "SandwichForCausalLM")
    values = {"dtype": dtype, "max_num_seqs": 6, "max_num_batched_tokens": 32}
    with LLM(str(directory), enforce_eager=True, **values) as llm, replayed(monkeypatch) as seen:
        expected = written(llm)
        assert seen.call_by_call == seen.steps > 0
    with LLM(str(directory), **values) as llm, replayed(monkeypatch) as seen:
        assert written(llm) == expected
        assert_repeated(seen)


def test_prompts_are_recorded_once_and_repeated_whatever_their_lengths(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    original = PlanCapture.record_ranges
    monkeypatch.setattr(PlanCapture, "record_ranges",
                        lambda capture, compute, *given: (recorded.append(given[0]), original(capture, compute, *given))[1])
    one = SamplingParams(temperature=0, max_tokens=1)
    prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (9, 40, 3, 57)]
    values = {"dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 64, "enable_prefix_caching": False}
    with LLM(str(small_checkpoint), enforce_eager=True, **values) as llm:
        expected = [o.outputs[0].token_ids for o in llm.generate(prompts, one, use_tqdm=False)]
    with LLM(str(small_checkpoint), **values) as llm, replayed(monkeypatch) as seen:
        assert [llm.generate(p, one, use_tqdm=False)[0].outputs[0].token_ids for p in prompts] == expected
        assert [o.outputs[0].token_ids for o in llm.generate(prompts[::-1], one, use_tqdm=False)] == expected[::-1]
        assert recorded == [64]
        assert seen.prompts == [40, 3, 57, 64, 45]  # the last two: all of 57 and 7 of 3 and 40, then the other tokens


@pytest.mark.parametrize(("eager", "arenas"), [(False, 2), (True, 1)], ids=["decode steps and steps with prompts", "call by call"])
def test_memory_of_steps_is_used_before_the_first_of_them(
        small_checkpoint: Path, eager: bool, arenas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[Arena] = []
    monkeypatch.setattr(Arena, "touch", lambda arena: touched.append(arena))
    with LLM(str(small_checkpoint), enforce_eager=eager):
        assert len(touched) == arenas


def test_a_backend_that_needs_the_numbers_of_each_step_repeats_decode_steps_only(
        small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuAttention, "range_graph_support", False)
    with LLM(str(small_checkpoint), dtype="float32") as llm, replayed(monkeypatch) as seen:
        written(llm)
        assert seen.decode
        assert not seen.prompts


def test_a_batch_that_shrinks_records_nothing_more(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    original = PlanCapture.record
    monkeypatch.setattr(PlanCapture, "record", lambda capture, compute, rows: (recorded.append(rows), original(capture, compute, rows))[1])
    with LLM(str(small_checkpoint), max_num_seqs=8) as llm:
        llm.generate(PROMPTS[:5], [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 3, 4, 5, 6)], use_tqdm=False)
        assert recorded == [8]
        llm.generate(PROMPTS[:1], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        assert recorded == [8]


def test_whoever_keeps_a_tensor_of_a_step_keeps_its_values(small_checkpoint: Path) -> None:
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        kept.extend((t, t.clone()) for t in (output if isinstance(output, tuple) else (output,)))

    def watch(model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            if name.endswith("gate_up_proj"):
                module.register_forward_hook(hook)

    with LLM(str(small_checkpoint), dtype="float32", max_num_seqs=8, max_num_batched_tokens=16, enable_prefix_caching=False) as llm:
        llm.apply_model(watch)
        written(llm)
    assert len(kept) > 20
    assert all(torch.equal(tensor, values) for tensor, values in kept)


def test_the_same_after_sleep(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(small_checkpoint), dtype="float32", enable_sleep_mode=True) as llm:
        expected = written(llm)
        for level in (1, 2):
            llm.sleep(level)
            llm.wake_up()
            with replayed(monkeypatch) as seen:
                assert written(llm) == expected
                assert seen


def test_what_a_backend_derived_from_a_batch_is_derived_again_before_each_repetition(
        small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(small_checkpoint), dtype="float32", enforce_eager=True) as llm:
        expected = written(llm)
    refilled: list[int] = []

    def prepare(self: CpuAttention, batch: AttentionBatch, out: PagedMeta | None = None) -> PagedMeta:
        if out is None:
            return PagedMeta(replace(batch, block_table=batch.block_table.clone()), self.spec.block_tokens)
        refilled.append(rows := batch.block_table.shape[0])
        out.batch.block_table[:rows] = batch.block_table
        return out

    monkeypatch.setattr(CpuAttention, "prepare", prepare)
    with LLM(str(small_checkpoint), dtype="float32") as llm, replayed(monkeypatch) as seen:
        assert written(llm) == expected
        assert len(refilled) == len(seen) > 0


def test_a_model_that_computes_with_torch_runs_call_by_call_and_the_log_says_why(
        small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(small_checkpoint), dtype="float32") as llm, replayed(monkeypatch) as seen:
        expected = written(llm)
        repeated = len(seen)
        llm.apply_model(lambda model: setattr(model, "norm", TimesOne(model.norm)))
        with structlog.testing.capture_logs() as logs:
            assert written(llm) == expected
        structlog.reset_defaults()
        assert [e["reason"] for e in logs if e["event"] == "decode steps run call by call"] == ["it computes with torch (mul)"]
        assert len(seen) == repeated


def test_hooks_on_a_model_are_called_at_every_step(small_checkpoint: Path) -> None:
    calls: list[int] = []
    with LLM(str(small_checkpoint), dtype="float32") as llm:
        expected = written(llm)
        llm.apply_model(lambda model: model.layers[0].register_forward_hook(lambda *given: calls.append(1)))
        assert written(llm) == expected
        assert len(calls) >= max(LENGTHS)


def test_methods_that_were_replaced_are_called_at_every_step(small_checkpoint: Path) -> None:
    calls: list[int] = []

    def replace(model: Any) -> None:
        forward = model.layers[1].mlp.forward
        model.layers[1].mlp.forward = lambda *given: (calls.append(1), forward(*given))[1]

    with LLM(str(small_checkpoint), dtype="float32") as llm:
        expected = written(llm)
        llm.apply_model(replace)
        assert written(llm) == expected
        assert len(calls) >= max(LENGTHS)


def test_weights_that_are_replaced_are_used_from_then_on(small_checkpoint: Path) -> None:
    def replace(model: Any) -> None:
        norm = model.norm
        norm.tensors["weight"] = norm.tensors["weight"].flip(0).clone()

    found = []
    for eager in (True, False):
        with LLM(str(small_checkpoint), dtype="float32", enforce_eager=eager) as llm:
            before = written(llm)
            llm.apply_model(replace)
            found.append(written(llm))
            assert found[-1] != before
    assert found[0] == found[1]


def test_engines_in_two_threads_record_each_its_own(small_checkpoint: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "m", "Qwen3ForCausalLM")
    expected = {}
    for directory in (small_checkpoint, other):
        with LLM(str(directory), dtype="float32", enforce_eager=True) as llm:
            expected[directory] = written(llm)
    found: dict[Path, list[Any]] = {}

    def work(directory: Path) -> None:
        with LLM(str(directory), dtype="float32") as llm:
            found[directory] = [written(llm) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(directory,)) for directory in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {directory: [tokens] * 3 for directory, tokens in expected.items()}


# -- capture


def capture(compute: Callable[[torch.Tensor], torch.Tensor], rows: int = 4) -> tuple[torch.Tensor, Callable[[int], None], torch.Tensor]:
    """An input, how to repeat what was computed of it, and the result."""
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    replay, (out,) = PlanCapture(Arena(2**16)).record(lambda: (compute(x),), rows)
    return x, replay, out


def test_a_repetition_computes_the_first_rows_from_new_numbers_and_leaves_the_others() -> None:
    gain = torch.full((16,), 2.0)
    x, replay, out = capture(lambda x: rms_norm(rms_norm(x, gain, 1e-5).view(8, 8), gain[:8], 1e-5).view(4, 16))
    before = out.clone()
    x.copy_(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)))
    replay(3)
    expected = rms_norm(rms_norm(x, gain, 1e-5).view(8, 8), gain[:8], 1e-5).view(4, 16)
    assert torch.equal(out[:3], expected[:3])
    assert torch.equal(out[3], before[3])
    replay(4)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("compute", "reason"), [
    (lambda x: x + 1, r"torch \(add\)"),
    (lambda x: rms_norm(x, torch.ones(16), 1e-5), r"torch \(ones\)"),
    (lambda x: torch.nn.functional.layer_norm(x, (16,)), r"torch \(native_layer_norm\)"),
    (lambda x: x.t().contiguous(), r"torch \(clone\)"),
    (lambda x: x.mul_(x[0, 0].item()), r"torch \(_local_scalar_dense\)"),
    (lambda x: rms_norm(x[:2], GAIN, 1e-5), "works on 2 rows of a step of 4"),
    (lambda x: x[:3], "no rows of a kernel's result"),
    (lambda x: token_attention(*[x.view(4, 1, 16)] * 3, STARTS, Scores(1.0), empty((4, 1, 16), torch.float32)),
     "kvloom_attend_tokens cannot be recorded"),
    (lambda x: rms_norm(x, GAIN, 1e-5)[:2], "no rows of a kernel's result"),
])
def test_what_would_not_be_repeated_is_not_recorded(compute: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    with pytest.raises(NotRecordableError, match=reason):
        capture(compute)
    x, _, out = capture(lambda x: rms_norm(x, GAIN, 1e-5))  # and the thread is not left recording
    assert torch.equal(out, rms_norm(x, GAIN, 1e-5))


def test_without_room_nothing_is_recorded() -> None:
    x = torch.zeros(4, 16)
    with pytest.raises(NotRecordableError, match=r"torch \(empty\)"):
        PlanCapture(Arena(128)).record(lambda: (rms_norm(x, GAIN, 1e-5),), 4)


@pytest.mark.parametrize("max_num_seqs", [32, 16, 1])
def test_as_many_ranges_as_tokens_are_no_rows(small_checkpoint: Path, max_num_seqs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"dtype": "float32", "max_num_seqs": max_num_seqs, "max_num_batched_tokens": 32, "max_model_len": 96}
    with LLM(str(small_checkpoint), enforce_eager=True, **values) as llm:
        expected = written(llm)
    with LLM(str(small_checkpoint), **values) as llm, replayed(monkeypatch) as seen:
        assert written(llm) == expected
        assert_repeated(seen)
