"""How many threads torch and our kernels compute with."""

from __future__ import annotations

import os

import torch

from kvloom.runtime.host_cores import HostCores, host_cores

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def choose_threads(cores: HostCores | None = None) -> str:
    """As many threads as cores that this process may use, unless the user said how many; the line for the start report.

    torch knows which cores a process may run on, not how much of them its control groups leave. A number that is none of those that
    torch takes by itself was set by the user.

    Args:
        cores: that this process may use; None: look.
    """
    cores = cores or host_cores()
    by_itself = (cores.allowed, cores.physical, os.cpu_count())
    variable = next((name for name in VARIABLES if os.environ.get(name)), None)
    if variable is None and torch.get_num_threads() in by_itself and torch.get_num_threads() > cores.threads:
        torch.set_num_threads(cores.threads)
    found = torch.get_num_threads()
    quota = "" if cores.quota is None else f", {cores.quota:g} of them by its control groups' quota"
    by = f" by {variable}" if variable is not None else " by torch.set_num_threads" if found not in (*by_itself, cores.threads) else ""
    return f"threads: {found}{by} ({cores.allowed} cores{quota})"
