"""What `scripts/gpu_check` runs on a GPU, with tiny models on the CPU: that it measures, and that it notices what is wrong."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import gpu_decode
import gpu_exact
import gpu_graphs
import gpu_models
import gpu_throughput
import pytest
import torch
from bench_limits import Shape
from gpu_graphs import Chosen
from gpu_table import Section

TINY = {"vocab_size": 512, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids of the tiny vocabulary, and little memory."""
    monkeypatch.setattr(gpu_models, "VOCABULARY", TINY["vocab_size"])
    monkeypatch.setattr(gpu_models.random_ids, "__defaults__", (TINY["vocab_size"],))
    for module in (gpu_exact, gpu_graphs):
        monkeypatch.setattr(module, "KV_BYTES", 16 * 2**20)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpu_models.model(tmp_path_factory.mktemp("gpu"), "mistral", **{**TINY, "sliding_window": 20})


def test_engines_that_are_right_agree_with_transformers() -> None:
    (found,) = gpu_exact.run("cpu", count=3, longest=40, new=6, **TINY)
    assert found.failures == ()
    assert [row[:2] for row in found.rows] == [(name, dtype) for name in ("llama", "qwen3", "mistral") for dtype in ("float32", "bfloat16")]
    assert all(row[2] == "18 of 18 tokens equal, 0 ties" for row in found.rows[::2])


def test_a_window_that_is_too_wide_is_noticed(mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_exact, "ours", partial(gpu_exact.ours, hf_overrides={"sliding_window": 22}))
    asked = gpu_models.prompts(3, 60)
    row, wrong = gpu_exact.check_tokens("mistral", mistral, "cpu", asked, 12)
    assert "tokens are not the best; first token" in wrong[0], row
    row, wrong = gpu_exact.check_logprobs("mistral", mistral, "cpu", asked, 12)
    assert wrong, row


def test_errors_of_log_probabilities_are_bounded_and_nan_is_one() -> None:
    theirs = gpu_exact.spread(torch.full((1000,), 0.02))
    assert gpu_exact.excess(theirs, theirs) == []
    assert len(gpu_exact.excess({**theirs, "most": 0.1}, theirs)) == 1
    assert len(gpu_exact.excess(gpu_exact.spread(torch.full((9,), float("nan"))), theirs)) == 3


def test_recorded_steps_agree_with_steps_call_by_call() -> None:
    (found,) = gpu_graphs.run("cpu", names=("llama",), batches=(1, 3), longest=20, **TINY)
    assert found.failures == ()
    assert [row[:4] for row in found.rows] == [("llama", dtype, "145 of 145", "0") for dtype in ("float32", "bfloat16")]


def outputs(*tokens: int) -> list[list[Chosen]]:
    """One request's; the next token is as good but for 0.1, and others are not among the best."""
    return [[Chosen(token, {token: -1.0, token + 1: -1.1}) for token in tokens]]


def test_other_tokens_are_a_tie_or_a_failure_by_how_good_they_were() -> None:
    assert gpu_graphs.parting(outputs(1, 2)[0], outputs(1, 2)[0]) == (2, 0.0)
    eager, other, wrong = ([outputs(1, 5, 8)], 0), ([outputs(1, 6, 9)], 4), ([outputs(1, 9, 9)], 4)
    row, failures = gpu_graphs.compare("m", "bfloat16", eager, other)
    assert (row, failures) == (("m", "bfloat16", "1 of 3", "1", "4"), [])
    assert "another token 1, worse by 0.1" in gpu_graphs.compare("m", "float32", eager, other)[1][0]
    assert "worse by inf" in gpu_graphs.compare("m", "bfloat16", eager, wrong)[1][0]


def test_an_engine_that_captured_nothing_or_was_not_eager_is_noticed() -> None:
    one = [outputs(1, 2)]
    assert "nothing was captured" in gpu_graphs.compare("m", "float32", (one, 0), (one, 0))[1][0]
    assert "enforce_eager" in gpu_graphs.compare("m", "float32", (one, 3), (one, 3))[1][0]


def test_a_decode_steps_share_is_of_weights_and_contexts_at_the_copys_rate(tmp_path: Path) -> None:
    directory = gpu_models.model(tmp_path, "llama", **TINY)
    shape = Shape(directory)
    read = shape.weight_bytes + 4 * (10 + 3) * shape.kv_bytes
    found = gpu_decode.section([(4, 2e-3)], shape, read / 1e-3, 10, 6)
    assert found.rows == (("4", "2.000", "2000", f"{read / 1e6:.0f}", "50%"),)


def test_a_decode_step_is_measured_where_all_prompts_are_computed_at_once(mistral: Path) -> None:
    from kvloom import LLM

    def engine(step_tokens: int) -> LLM:
        return LLM(str(mistral), skip_tokenizer_init=True, max_model_len=32, max_num_seqs=3, max_num_batched_tokens=step_tokens,
                   kv_cache_memory=2**20, enable_prefix_caching=False)

    with engine(3 * 20) as llm:
        assert 0 < gpu_decode.step_s(llm, 3, 20, 5) < 1
    with engine(20) as llm, pytest.raises(SystemExit, match="one step"):
        gpu_decode.step_s(llm, 3, 20, 3)


def test_requests_at_once_are_the_same_for_every_engine_and_of_the_lengths_that_were_asked(mistral: Path) -> None:
    requests = gpu_throughput.make_requests(5, 3, 20, 0)
    assert requests == gpu_throughput.make_requests(5, 3, 20, 0)
    assert all(3 <= len(prompt) <= 20 and 3 <= new <= 20 for prompt, new in requests)
    figures = gpu_throughput.measure("kvloom", mistral, "cpu", 5, 3, 20)
    assert figures["output_tokens"] == sum(new for _, new in requests)
    assert figures["prompt_tokens"] == sum(len(prompt) for prompt, _ in requests)


def test_an_engine_that_fails_or_is_late_leaves_the_others_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    broken, late = gpu_throughput.run_alone("kvloom", tmp_path / "m", 60), gpu_throughput.run_alone("kvloom", tmp_path / "m", 0.01)
    assert (broken, late) == ("kvloom: exit code 2", "kvloom: not done in 0 s")
    found = gpu_throughput.section({"kvloom": {"seconds": 2.0, "prompt_tokens": 100, "output_tokens": 50}, "transformers": late})
    assert (found.rows, found.failures) == ((("kvloom", "2.0", "25", "75", "1.00"),), (late,))
    both = gpu_throughput.section({name: {"seconds": s, "prompt_tokens": 0, "output_tokens": 50} for name, s in (("kvloom", 1), ("o", 3))})
    assert both.rows[1][-1] == "3.00"


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs the kernel interpreted: set TRITON_INTERPRET=1")


@interpreted
def test_attention_is_checked_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton: install kvloom[gpu]")
    import gpu_attention as bench

    monkeypatch.setattr(bench, "ROUNDS", 1)
    decode, prefill = bench.run("cpu", [bench.Work(2, 1, 40)], [bench.Work(1, 20, 20), bench.Work(1, 5, 30)], bench.Heads(4, 2, 16),
                                2**10, bench.Limits(1e9, 1e9))
    assert (decode.failures, prefill.failures) == ((), ())
    assert [row[:2] for row in decode.rows] == [("2", "40")]
    assert prefill.rows[1][-2:] == ("-", "-"), "torch's causal mask does not begin in the middle"


@interpreted
def test_writes_are_checked_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton: install kvloom[gpu]")
    import gpu_attention
    import gpu_writes

    monkeypatch.setattr(gpu_attention, "ROUNDS", 1)
    found = gpu_writes.run("cpu", gpu_attention.Limits(1e9, 1e9), [9], gpu_attention.Heads(1, 1, 16), 1)
    assert found.failures == ()
    assert [row[:2] for row in found.rows] == [("write_kernel", "9"), ("norm_rope_write_kernel", "9")]


@interpreted
def test_writes_that_are_wrong_are_a_failure() -> None:
    pytest.importorskip("triton", reason="needs triton: install kvloom[gpu]")
    import gpu_attention
    import gpu_writes

    heads = gpu_attention.Heads(2, 1, 16)
    case = gpu_writes.WriteCase(3, heads, "cpu", 2**10)
    for ours, theirs in ((case.write, case.write_reference), (case.norm_rope_write, case.norm_rope_write_reference)):
        assert case.error(ours, theirs) < gpu_writes.TOLERANCE
        for wrong in (lambda turn: None, lambda turn, ours=ours: ours(turn + 1)):
            assert case.error(wrong, theirs) > gpu_writes.TOLERANCE
    measured = gpu_writes.Measured("write_kernel", 3, 1.0, 1.0, 1, float("nan"))
    assert "nan" in gpu_writes.section([measured], gpu_attention.Limits(1e9, 1e9), heads).failures[0]


@interpreted
def test_every_triton_kernel_is_launched_by_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton: install kvloom[gpu]")
    import gpu_attention
    import gpu_writes

    from kvloom_kernels.gpu import attend, attention

    launched: set[str] = set()

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(attend, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.add(self.name)
            return self.kernel[grid]

    kernels = {name for name in vars(attend) if name.endswith("_kernel")}
    for name in kernels:
        monkeypatch.setattr(attention, name, Kernel(name))
    heads, card = gpu_attention.Heads(2, 1, 16), gpu_attention.Limits(1e9, 1e9)
    monkeypatch.setattr(gpu_attention, "ROUNDS", 1)
    gpu_attention.run("cpu", [gpu_attention.Work(1, 1, 520)], [gpu_attention.Work(1, 4, 4)], heads, 1, card)
    gpu_writes.run("cpu", card, [2], heads, 1)
    assert launched == kernels


@interpreted
def test_attention_that_is_wrong_is_a_failure() -> None:
    pytest.importorskip("triton", reason="needs triton: install kvloom[gpu]")
    import gpu_attention as bench

    case = bench.PagedCase(bench.Work(2, 1, 40), bench.Heads(4, 2, 16), "cpu", 1)
    assert case.error() < bench.TOLERANCE
    case.contexts -= 1
    assert case.error() > bench.TOLERANCE
    measured = bench.Measured(case.work, 1.0, 1.0, None, float("nan"))
    assert "nan" in bench.failures([measured])[0]
    assert isinstance(bench.sections([measured], [], bench.Limits(1e9, 1e9), case.heads)[0], Section)


@interpreted
def test_bytes_and_operations_are_those_that_must_be() -> None:
    pytest.importorskip("triton", reason="needs triton: install kvloom[gpu]")
    import gpu_attention as bench

    heads = bench.Heads(4, 2, 16)
    assert bench.Work(3, 1, 100).least_bytes(heads) == 3 * (100 * 2 * 2 * 2 * 16 + 2 * 2 * 4 * 16)
    assert bench.Work(1, 1, 100).flop(heads) == 4 * 100 * 4 * 16
    assert bench.Work(2, 3, 3).flop(heads) == 2 * 4 * (1 + 2 + 3) * 4 * 16
