"""`scripts/bench_kernels`: which kernels it measures and what it says of them. That its lines compare equal things: tests/kernels."""

from __future__ import annotations

import pytest
from repository import ROOT
from script_helpers import imported_script

from kvloom_kernels.native import problem

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"the C++ kernels are not there: {problem()}")
main = imported_script(ROOT / "scripts/bench_kernels").main


def test_each_line_has_both_times_and_their_ratio(capsys: pytest.CaptureFixture) -> None:
    main(["--small", "--rounds", "2", "best", "draw"])
    header, names, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("bfloat16 products: ")
    assert names.split() == ["ours,", "us", "torch,", "us", "torch", "/", "ours"]
    assert [line.split(",")[0] for line in lines] == ["best token", "draw"]
    for line in lines:
        ours, torchs, ratio = map(float, line.split()[-3:])
        assert min(ours, torchs, ratio) > 0


def test_a_kernel_that_is_not_there_is_refused_before_anything_is_measured(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="no kernel is called 'beast': there are kvloom_product, "):
        main(["--small", "best", "beast"])
    assert "best token" not in capsys.readouterr().out
