"""The table that `scripts/bench` makes of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_table
import pytest
from repository import ROOT
from script_helpers import imported_script

SHAPE = {"weight_bytes": 1e8, "kv_bytes": 1000, "layer_flop": 1e8, "logits_flop": 1e7}
MACHINE = "Measured on 2026-11-29: 2 cores of AMD EPYC (bfloat16 products: widened), Python 3.11.7, torch 2.13.0+cpu"
BESIDE_VLLM = "output tok/s, 64 requests, beside vLLM"
START = "s until 4 tokens were answered, compiled kernels at hand"
COLD = "s until 4 tokens were answered, kernels compiled first"


def machine(words: str = MACHINE, read_bytes_s: float = 1e9, flop_s: float = 1e12, **more: Any) -> dict[str, Any]:
    return {"machine": words, "limits": {"read_bytes_s": read_bytes_s, "flop_s": flop_s}, **more}


def run(name: str, dtype: str = "bfloat16", workload: str = "mixed", version: str | None = None, **figures: float) -> dict[str, Any]:
    base = {"output_tok_s": 1.0, "decode_tok_s": 1.0, "single_tok_s": 1.0, "start_s": 1.0, "peak_rss_bytes": 2e9, "prompt_tokens": 100,
            "output_tokens": 50, "read_kv_tokens": 7500}
    said = {} if version is None else {"version": version}
    return {"workload": workload, "name": name, **said, "dtype": dtype, "round": 0, "figures": base | figures, "shape": SHAPE}


def text(*lines: dict[str, Any]) -> list[str]:
    return list(bench_table.table(lines if "machine" in lines[0] else [machine(), *lines]))


def cells(what: str, *lines: dict[str, Any]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text(*lines) if line.startswith(f"| {what}")]


def test_ratios_are_of_medians_and_say_how_far_ours_is_ahead() -> None:
    runs = [run("kvloom", output_tok_s=n, start_s=2.0) for n in (300, 100, 200)]
    runs += [run("vllm", output_tok_s=n) for n in (90, 100, 1000)] + [run("vllm eager", start_s=8.0)]
    assert cells(BESIDE_VLLM, *runs) == [[BESIDE_VLLM, "200 (100 to 300)", "vllm: 100 (90 to 1000)", "2.00", "1.2", "1.4"]]
    assert cells(START, *runs)[0][3] == "4.00"


def test_each_line_has_a_name_of_its_own() -> None:
    assert len({line.what for line in bench_table.LINES}) == len(bench_table.LINES)


def test_what_was_not_measured_is_said() -> None:
    assert cells(BESIDE_VLLM, run("vllm"))[0][1:4] == ["not measured", "vllm: 1.0 (1.0 to 1.0)", ""]
    assert cells(BESIDE_VLLM, run("kvloom"))[0][1:4] == ["1.0 (1.0 to 1.0)", "vllm: not measured", ""]
    assert cells("share", run("vllm"))[0][1] == "not measured"
    assert text(run("kvloom"))[-1] == "Not measured on this machine: prefix, qwen3, text, trace. A trace is named by `--trace`."
    ours = [part for name in ("mixed", "prefix", "qwen3", "trace") for part in (machine(), run("kvloom", workload=name))]
    assert text(*ours)[-1] == "Not measured on this machine: text."
    assert not any("Not measured" in line for line in text(*ours, machine(), run("kvloom, sampled, text", workload="text")))


def test_a_cold_start_is_told_beside_a_compiled_peer_and_must_reach_nothing() -> None:
    runs = [run("kvloom", start_s=2.0), run("vllm", start_s=90.0), run("kvloom cold", start_s=30.0)]
    assert cells(COLD, *runs) == [[COLD, "30.0 (30.0 to 30.0)", "vllm: 90.0 (90.0 to 90.0)", "3.00", "", ""]]
    assert cells(START, *runs)[0][1] == "2.0 (2.0 to 2.0)"


def test_memory_is_what_weights_and_cache_do_not_take() -> None:
    weights_and_cache = SHAPE["weight_bytes"] + bench_table.KV_BYTES
    runs = [run("kvloom", peak_rss_bytes=weights_and_cache + 1e8), run("vllm", peak_rss_bytes=weights_and_cache + 3e8)]
    assert cells("peak memory", *runs)[0][1:4] == ["100 (100 to 100)", "vllm: 300 (300 to 300)", "3.00"]
    below = [run("kvloom", peak_rss_bytes=weights_and_cache - 1e8), runs[1]]
    assert cells("peak memory", *below)[0][1:4] == ["-100.0 (-100.0 to -100.0)", "vllm: 300 (300 to 300)", "nothing of ours"]
    assert bench_table.MEMORY_NOTE in text(*below)


def test_a_peer_that_computes_in_float32_says_so_and_its_weights_are_twice_as_large() -> None:
    weights_and_cache = SHAPE["weight_bytes"] * 2 + bench_table.KV_BYTES
    runs = [run("kvloom"), run("vllm", "float32", output_tok_s=0.5, peak_rss_bytes=weights_and_cache + 3e8)]
    assert cells(BESIDE_VLLM, *runs)[0][2] == "vllm in float32: 0.5 (0.5 to 0.5)"
    assert cells("peak memory", *runs)[0][2] == "vllm in float32: 300 (300 to 300)"


def test_shares_are_of_what_the_machine_can_do() -> None:
    # 150 tokens of 1e8 operations, 50 rows of logits of 1e7, at 1e12 a second; 7500 tokens of 1000 bytes at 1e9 a second: 0.0230 s.
    assert cells("share", run("kvloom", output_tok_s=50 / 0.046, decode_tok_s=5.0)) == [
        ["share of the limit, all at once", "50%", "", "", "65 %", "75 %"],
        ["share of the limit, decoding one request", "50%", "", "", "80 %", "90 %"]]


def test_shares_use_limits_of_the_rounds_whose_figures_they_divide() -> None:
    lines = [machine(), run("kvloom", decode_tok_s=5.0), machine(read_bytes_s=9e9), run("kvloom", workload="text")]
    assert "memory is read at 1 GB/s" in text(*lines)[0]
    assert cells("share", *lines)[1][1] == "50%"


def test_the_header_says_machine_versions_and_limits() -> None:
    runs = [run("kvloom", version="kvloom 0.1.0 (abc1234)"), run("vllm", version="vllm 0.32.0"),
            run("vllm eager", version="vllm 0.32.0"), run("transformers")]
    assert text(*runs)[0] == f"{MACHINE}; kvloom 0.1.0 (abc1234), vllm 0.32.0; memory is read at 1 GB/s, products run at 1000 GFLOP/s."


def test_older_runs_say_neither_their_version_nor_the_workload_beside_the_machine() -> None:
    old, new = [machine(), run("kvloom")], [machine(workload="mixed", round=0), run("kvloom")]
    assert text(*old) == text(*new)
    assert text(*old)[0] == f"{MACHINE}; memory is read at 1 GB/s, products run at 1000 GFLOP/s."


@pytest.mark.parametrize("other", [MACHINE.replace("AMD EPYC", "Intel(R) Xeon(R)"), MACHINE.replace("2 cores", "4 cores"),
                                   MACHINE.replace("widened", "native")])
def test_runs_of_another_machine_are_left_out(other: str) -> None:
    lines = [machine(other, 9e9), run("kvloom", output_tok_s=900.0, version="kvloom 0.0.9"), machine(), run("kvloom", output_tok_s=100.0),
             machine(other, 9e9)]  # broken off before an engine ran
    assert text(*lines) == text(machine(), run("kvloom", output_tok_s=100.0))


def test_rounds_of_several_days_are_of_one_machine() -> None:
    later = MACHINE.replace("11-29", "12-01")
    lines = [machine(), run("kvloom", output_tok_s=100.0), machine(later), run("kvloom", output_tok_s=300.0)]
    assert text(*lines)[0].startswith("Measured from 2026-11-29 to 2026-12-01: 2 cores of AMD EPYC (bfloat16 products: widened), Python")
    assert cells(BESIDE_VLLM, *lines)[0][1] == "200 (100 to 300)"


def test_without_rounds_the_table_of_the_runs_that_are_there_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = imported_script(ROOT / "scripts/bench")
    lines = [machine(), run("kvloom", output_tok_s=100.0)]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bench.main(["--rounds", "0", "--folder", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [*text(*lines), ""]


def test_rounds_that_were_all_broken_off_are_no_measurement(tmp_path: Path) -> None:
    bench = imported_script(ROOT / "scripts/bench")
    (tmp_path / "runs.jsonl").write_text(json.dumps(machine()) + "\n")
    with pytest.raises(SystemExit, match="nothing was measured"):
        bench.main(["--rounds", "0", "--folder", str(tmp_path)])
