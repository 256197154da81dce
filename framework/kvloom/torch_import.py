"""The first import of torch. Torch-free until then."""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache

SPINS = 20_000
"""Of torch's OpenMP threads before they sleep: 0.2 ms, more than Python takes between two operations. By themselves they do 300000, for
3 ms keeping cores from other processes and from our kernels: one after an operation of torch took 1.6 times as long."""
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@cache
def import_torch() -> tuple[str, ...]:
    """Import torch; its threads wait busily for a short time only, unless the user said how they wait or imported it before.

    GNU's OpenMP runtime reads the variable when it is loaded (libgomp's manual, ``GOMP_SPINCOUNT``); afterwards it is gone again.

    Returns:
        What the start report says about it: the same in every engine of a process.
    """
    if sys.platform != "linux" or any(name in os.environ for name in VARIABLES):
        importlib.import_module("torch")
        return ()
    if "torch" in sys.modules:
        return (f"torch was imported before: its threads wait busily for some ms after each operation; GOMP_SPINCOUNT={SPINS} in the "
                "environment makes that short",)
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    try:
        importlib.import_module("torch")
    finally:
        del os.environ["GOMP_SPINCOUNT"]
    return ()
