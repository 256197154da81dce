"""torch's threads do not wait busily for long when kvloom imports it, unless the user said so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvloom.torch_import import VARIABLES, import_torch

CODE = """
import os, time
from kvloom.torch_import import import_torch
import_torch()
import torch
torch.set_num_threads(2)
x = torch.zeros(2**20)
spent_s = []
for _ in range(5):
    x.add_(1.0)
    begun_s = time.process_time()
    time.sleep(0.1)
    spent_s.append(time.process_time() - begun_s)
print(*sorted(spent_s)[2::2], os.environ.get("GOMP_SPINCOUNT"))
"""


def spent(**environment: str) -> tuple[float, float, str]:
    """Seconds of all cores while the process sleeps after an operation, median and most of five, and what is left of the variable."""
    free = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    ran = subprocess.run([sys.executable, "-c", CODE], env={**free, **environment}, capture_output=True, text=True, check=True, timeout=120)
    median, most, left = ran.stdout.split()
    return float(median), float(most), left


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores")
def test_threads_of_torch_sleep_soon_and_the_environment_is_as_before() -> None:
    median, _, left = spent()
    assert median < 2e-3
    assert left == "None"


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores")
def test_what_the_user_set_stays() -> None:
    _, most, left = spent(GOMP_SPINCOUNT="30000000")
    assert most > 5e-3
    assert left == "30000000"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP runtime")
def test_a_torch_that_was_there_before_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch  # noqa: F401

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (said,) = import_torch.__wrapped__()  # another's call may have been before this one
    assert "GOMP_SPINCOUNT=20000" in said
