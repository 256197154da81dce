"""The table that `scripts/bench` makes of its runs."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType
from typing import Any

import pytest
from repository import ROOT

LIMITS = {"machine": "a machine", "limits": {"read_bytes_s": 1e9, "flop_s": 1e12}}
SHAPE = {"weight_bytes": 1e8, "kv_bytes": 1000, "layer_flop": 1e8, "logits_flop": 1e7}


@pytest.fixture(scope="module")
def bench() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        loader = SourceFileLoader("bench_script", str(ROOT / "scripts/bench"))
        module: ModuleType = module_from_spec(spec_from_loader(loader.name, loader))
        patch.setitem(sys.modules, loader.name, module)
        loader.exec_module(module)
        yield module


def run(name: str, dtype: str = "bfloat16", **figures: float) -> dict[str, Any]:
    base = {"output_tok_s": 1.0, "decode_tok_s": 1.0, "single_tok_s": 1.0, "start_s": 1.0, "peak_rss_bytes": 2e9, "prompt_tokens": 100,
            "output_tokens": 50, "read_kv_tokens": 7500}
    return {"workload": "mixed", "name": name, "dtype": dtype, "round": 0, "figures": base | figures, "shape": SHAPE}


def cells(bench: Any, runs: list[dict[str, Any]], what: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in bench.table([LIMITS, *runs]) if line.startswith(f"| {what}")]


def test_ratios_are_of_medians_and_say_how_far_ours_is_ahead(bench: Any) -> None:
    runs = [run("kvloom", output_tok_s=n, start_s=2.0) for n in (300, 100, 200)]
    runs += [run("vllm", output_tok_s=n) for n in (90, 100, 1000)] + [run("vllm eager", start_s=8.0)]
    lines = cells(bench, runs, "output tok/s")
    assert lines[0] == ["output tok/s", "200 (100 to 300)", "vllm: 100 (90 to 1000)", "2.00", "1.2", "1.4"]
    assert lines[1][2:4] == ["transformers: not measured", ""]
    assert cells(bench, runs, "s until")[0][3] == "4.00"


def test_what_was_not_measured_has_no_line(bench: Any) -> None:
    assert not cells(bench, [run("vllm")], "output tok/s")
    assert not cells(bench, [run("kvloom")], "output tok/s, prefix")


def test_memory_is_what_weights_and_cache_do_not_take(bench: Any) -> None:
    weights_and_cache = SHAPE["weight_bytes"] + bench.KV_BYTES
    runs = [run("kvloom", peak_rss_bytes=weights_and_cache + 1e8), run("vllm", peak_rss_bytes=weights_and_cache + 3e8)]
    assert cells(bench, runs, "memory")[0][1:4] == ["100 (100 to 100)", "vllm: 300 (300 to 300)", "3.00"]
    assert cells(bench, [run("kvloom", peak_rss_bytes=1e8), runs[1]], "memory")[0][3] == "nothing of ours"


def test_a_peer_that_computes_in_float32_says_so_and_its_weights_are_twice_as_large(bench: Any) -> None:
    weights_and_cache = SHAPE["weight_bytes"] * 2 + bench.KV_BYTES
    runs = [run("kvloom"), run("vllm", "float32", output_tok_s=0.5, peak_rss_bytes=weights_and_cache + 3e8)]
    assert cells(bench, runs, "output tok/s")[0][2] == "vllm in float32: 0.5 (0.5 to 0.5)"
    assert cells(bench, runs, "memory")[0][2] == "vllm in float32: 300 (300 to 300)"


def test_shares_are_of_what_the_machine_can_do(bench: Any) -> None:
    # 150 tokens of 1e8 operations, 50 rows of logits of 1e7, at 1e12 a second; 7500 tokens of 1000 bytes at 1e9 a second: 0.0230 s.
    assert cells(bench, [run("kvloom", output_tok_s=50 / 0.046, decode_tok_s=5.0)], "share") == [
        ["share of the limit, all at once", "50%", "", "", "65 %", "75 %"],
        ["share of the limit, decoding one request", "50%", "", "", "80 %", "90 %"]]
