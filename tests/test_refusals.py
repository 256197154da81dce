"""Every kind of bad input is refused, also where Python leaves asserts out."""

from __future__ import annotations

import subprocess
import sys

import pytest
from repository import ROOT, load_script

ALL_REFUSED = "15 kinds of bad input, 0 not refused as they should be; asserts are "


def test_every_kind_of_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the script adds its plugins
    code = load_script("check_refusals").main()
    said = capsys.readouterr().out
    assert code == 0, said
    assert f"{ALL_REFUSED}on" in said


def test_every_kind_of_bad_input_is_refused_without_asserts() -> None:
    done = subprocess.run([sys.executable, "-O", str(ROOT / "scripts/check_refusals.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ALL_REFUSED}off" in done.stdout
