"""Engines of `scripts/bench` that stay in one process for all rounds."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

ENGINE = """
import json, os, sys
for number in sys.stdin:
    print("a warning of the engine's", flush=True)
    if int(number) == 7:
        sys.exit("no memory left")
    print(json.dumps({"pid": os.getpid(), "round": int(number)}), flush=True)
"""


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_rounds

    yield bench_rounds.process
    sys.modules.pop("bench_rounds")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_process_that_stays_serves_round_after_round_and_is_halted_between(process: Callable[..., Any]) -> None:
    with process([sys.executable, "-c", ENGINE]) as staying:
        first = staying.round(0)
        pid = int(first["pid"])
        assert os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT) is not None  # the signal has arrived
        assert state_of(pid) == "T"
        assert staying.round(1) == {"pid": pid, "round": 1}
    assert not Path(f"/proc/{pid}").exists()


def test_what_a_process_said_when_it_failed_is_told(process: Callable[..., Any]) -> None:
    with process([sys.executable, "-c", ENGINE]) as failing, pytest.raises(SystemExit, match="(?s)failed:.*no memory left"):
        failing.round(7)
