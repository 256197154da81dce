"""`bench_core`, `bench_deterministic`, `bench_idle` and `profile_step`: each runs to its end and prints what it says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_steps import note_seconds, timed_steps
from repository import ROOT
from script_helpers import imported_script

from kvloom import LLM, SamplingParams
from kvloom.testing.checkpoints import make_checkpoint
from kvloom_kernels.native import problem

core, deterministic, idle, profile = (imported_script(ROOT / f"scripts/{name}") for name in (
    "bench_core", "bench_deterministic", "bench_idle", "profile_step"))
needs_kernels = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of the length and with the ids that these scripts ask for."""
    return str(make_checkpoint(tmp_path_factory.mktemp("m") / "tiny", tokenizer=False, vocab_size=30000, max_position_embeddings=2048))


@pytest.fixture(autouse=True)
def other_tests_find_what_they_had(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(profile.plan, "library", profile.plan.library)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+(?:\.\d+)?", text)]


def test_bench_core_names_the_machine_and_the_parts_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    core.main(["--steps", "20", "--context", "32", "--window", "24"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Measured on .* cores of .*; prompts of 32 tokens, a window of 24", header)
    for rows, line in zip((32, 256), lines, strict=True):
        found = re.fullmatch(r" *(\d+) running requests: median ms  schedule (\S+)  build (\S+)  commit (\S+)  total (\S+)   "
                             r"p99 of the total (\S+)", line)
        assert found is not None
        count, *parts, total, p99 = map(float, found.groups())
        assert count == rows
        assert all(0 < part < total for part in parts)
        assert p99 > 0


@needs_kernels
def test_bench_deterministic_tells_its_cost_and_the_hosts_share(
        directory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(deterministic, "limits", lambda: {"read_bytes_s": 1e9, "flop_s": 1e12})
    deterministic.main([directory, "--requests", "2", "--rounds", "1", "--context", "8", "--steps", "10", "--rows", "2", "20"])
    header, *rates, cost, few, many = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Measured on .* cores of .*; tiny; this machine reads 1\.0 GB/s and multiplies 1\.00 TFLOP/s", header)
    for wanted, line in zip(("False", "True"), rates, strict=True):
        assert line.startswith(f"deterministic={wanted}")
        assert min(numbers(line)) > 0
    assert re.fullmatch(r"cost -?\d+\.\d%", cost)
    for rows, line in ((2, few), (20, many)):
        found = re.fullmatch(r" *(\d+) requests: a decode step takes (\S+) ms, scheduling and batch (\S+) ms, (\S+)%", line)
        assert found is not None
        count, step_ms, host_ms, share = map(float, found.groups())
        assert count == rows
        assert 0 < host_ms < step_ms
        assert 0 < share < 100


def test_bench_idle_tells_a_step_after_each_pause(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    idle.main([directory, "--rounds", "2", "--context", "8", "--pauses", "0", "3"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "ms of a decode step, median (least to most), after a pause of 0 ms, 3 ms"
    assert [", after torch" in line for line in lines][:2] == [False, True]
    for line in lines:
        found = numbers(line)
        threads, cells = found[0], (found[1:4], found[4:])
        assert threads >= 1
        for median, least, most in cells:
            assert 0 < least <= median <= most


@needs_kernels
def test_profile_step_tells_where_a_steps_milliseconds_go(directory: str, capsys: pytest.CaptureFixture[str]) -> None:
    profile.main([directory, "--prompt", "16", "--new", "6"])
    titles, parts = [], []
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith(" "):
            title, ms = line.rsplit(": ", 1)
            titles.append(title)
            parts.append([])
            assert numbers(ms)[0] > 0
        else:
            parts[-1].append(line)
    steps = ("prefill step, 8 prompts of 16 tokens", "prefill step, 1 prompt of 32 tokens", "decode step, 1 rows, context 16",
             "decode step, 64 rows, context 16")
    assert titles == [f"{step}, {how}" for how in ("kernel by kernel", "recorded") for step in steps]
    for title, lines in zip(titles, parts, strict=True):
        assert any("between kernels" in line for line in lines)
        kernels = {line.split()[0] for line in lines}
        assert ("recorded" in kernels) == title.endswith("recorded")
        assert kernels & {"recorded", "product"}
        shares = [float(line.rsplit(" ", 1)[1].rstrip("%")) for line in lines]
        assert sum(shares) == pytest.approx(100, abs=len(shares))
        assert max(shares) < 100
    assert any("attend" in line for line in parts[0])


def test_steps_are_timed_within_the_block_with_what_others_note_of_them(small_checkpoint: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    parts_s: Counter[str] = Counter()
    waits: list[int] = []
    with LLM(str(small_checkpoint), skip_tokenizer_init=True, dtype="float32") as llm:
        note_seconds(llm.llm_engine.engine.scheduler, "schedule", parts_s)
        with timed_steps(llm, parts_s, before=lambda: waits.append(1)) as steps:
            llm.generate([[5, 6, 7]], params, use_tqdm=False)
        assert len(steps) == len(waits) == 3
        assert all(0 < step.parts_s["schedule"] < step.whole_s for step in steps)
        llm.generate([[5, 6, 7]], params, use_tqdm=False)
        assert len(steps) == 3
