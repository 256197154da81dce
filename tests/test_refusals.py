"""Every kind of bad input is refused, also where Python leaves asserts out."""

from __future__ import annotations

import subprocess
import sys

import pytest
from repository import ROOT


@pytest.mark.parametrize("option", [[], ["-O"]], ids=["with-asserts", "without-asserts"])
def test_every_kind_of_bad_input_is_refused(option: list[str]) -> None:
    done = subprocess.run([sys.executable, *option, str(ROOT / "scripts/check_refusals.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"15 kinds of bad input, 0 not refused as they should be; asserts are {'off' if option else 'on'}" in done.stdout
