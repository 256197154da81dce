"""The rounds of `scripts/bench`, and its engines' processes."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_rounds
import pytest
from repository import ROOT
from script_helpers import imported_script

ENGINE = """
import json, os, sys
for number in sys.stdin:
    print("a warning of the engine's", flush=True)
    if int(number) == 7:
        sys.exit("no memory left")
    print(json.dumps({"pid": os.getpid(), "round": int(number)}), flush=True)
"""

FIGURES = """
import json, os, pathlib, sys
cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "none"), "kvloom/kernels")
if "--compiles" in sys.argv:
    cache.mkdir(parents=True)
    (cache / "kernels-0.so").touch()
for number in sys.stdin:
    print(json.dumps({"start_s": 1.5, "cache": str(cache), "version": "kvloom 0.1.0 (abc1234)"}), flush=True)
"""


@pytest.fixture
def rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[dict[str, Any]]]]:
    """Rounds of engines that are a few lines of Python and run no model."""
    (tmp_path / "bench_engine").write_text(FIGURES)
    (tmp_path / "bench_limits.py").write_text("print('{\"flop_s\": 1.0}')")
    monkeypatch.setattr(bench_rounds, "HERE", tmp_path)
    monkeypatch.setattr(bench_rounds, "model", lambda folder, name: tmp_path)
    monkeypatch.setattr(bench_rounds, "Shape", lambda directory: SimpleNamespace(weight_bytes=7))
    monkeypatch.setattr(bench_rounds, "machine", lambda: "a machine")
    monkeypatch.setenv("XDG_CACHE_HOME", "warm")

    def all_rounds(**engines: bench_rounds.Engine) -> list[list[dict[str, Any]]]:
        monkeypatch.setattr(bench_rounds, "WORKLOADS", {"w": bench_rounds.Workload("m", (), engines)})
        with ExitStack() as resources:
            measurement = bench_rounds.Measurement(Namespace(vllm_dtype="bfloat16", folder=tmp_path), "w", resources)
            return [list(measurement.round(number)) for number in range(2)]

    return all_rounds


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_process_that_stays_serves_round_after_round_and_is_halted_between() -> None:
    with bench_rounds.process([sys.executable, "-c", ENGINE]) as staying:
        first = staying.round(0)
        pid = int(first["pid"])
        assert os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT) is not None  # the signal has arrived
        assert state_of(pid) == "T"
        assert staying.round(1) == {"pid": pid, "round": 1}
    assert not Path(f"/proc/{pid}").exists()


def test_what_a_process_said_when_it_failed_is_told() -> None:
    with bench_rounds.process([sys.executable, "-c", ENGINE]) as failing, pytest.raises(SystemExit, match="(?s)failed:.*no memory left"):
        failing.round(7)


def test_a_round_says_machine_workload_and_what_ran(rounds: Callable[..., list[list[dict[str, Any]]]]) -> None:
    warm = bench_rounds.Engine("kvloom", ("--requests", "4"))
    for number, (first, second) in enumerate(rounds(kvloom=warm)):
        assert first == {"machine": "a machine", "limits": {"flop_s": 1.0}, "workload": "w", "round": number}
        assert second == {"workload": "w", "name": "kvloom", "version": "kvloom 0.1.0 (abc1234)", "dtype": "bfloat16", "round": number,
                          "figures": {"start_s": 1.5, "cache": "warm/kvloom/kernels"}, "shape": {"weight_bytes": 7}}


def test_a_cold_engine_runs_in_the_first_round_and_finds_no_compiled_kernels(rounds: Callable[..., list[list[dict[str, Any]]]]) -> None:
    first, second = rounds(cold=bench_rounds.Engine("kvloom", ("--compiles",), cold=True))
    cache = Path(first[1]["figures"]["cache"])
    assert cache.is_absolute()
    assert not cache.exists()  # gone with the process
    assert len(second) == 1


def test_a_cold_engine_that_compiles_nothing_is_no_cold_start(rounds: Callable[..., list[list[dict[str, Any]]]],
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = rounds(cold=bench_rounds.Engine("kvloom", cold=True))
    assert len(first) == 1
    assert "cold left out, its kernels cannot be compiled here" in capsys.readouterr().out


def test_an_engine_says_its_version_and_the_commit_of_a_checkout(tmp_path: Path) -> None:
    engine = imported_script(ROOT / "scripts/bench_engine")
    assert engine.version("kvloom").startswith("kvloom 0.")
    repository = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for name in ("tracked", "untracked"):
        (tmp_path / name).touch()
    assert engine.commit_of(tmp_path / "tracked") == ""
    for command in (["init", "-q"], ["add", "tracked"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*repository, *command], check=True)
    head = subprocess.run([*repository, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert len(engine.commit_of(tmp_path / "tracked")) >= 7
    assert head.startswith(engine.commit_of(tmp_path / "tracked"))
    assert engine.commit_of(tmp_path / "untracked") == ""
