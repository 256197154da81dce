"""Threads of our kernels: results are the same whoever does what, nobody waits for a thread that does not come, forks and callers at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kvloom_kernels import native
from kvloom_kernels.norm import rms_norm
from kvloom_kernels.plan import Plan, recorded

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=f"the C++ kernels are not there: {native.problem()}")
CORES = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
HANGS_S = 60
"""Nobody takes that long who does not wait for a thread that does not run: then it is minutes, else a second."""
BUSY = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\nwhile True: pass"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def busy_core(core: int) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", BUSY, str(core)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def chain(kernels: int, rows: int) -> tuple[Plan, torch.Tensor, torch.Tensor]:
    """A plan whose kernels read what the one before wrote; its input and its output."""
    x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(0))
    weight, plan = torch.full((24,), 1.5), Plan(rows)
    plan.keep(x, weight)
    out = x
    with recorded(plan):
        for _ in range(kernels):
            out = rms_norm(out, weight, 1e-5)
            plan.keep(out)
    return plan, x, out


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_thread_sanitizer_finds_nothing(tmp_path: Path) -> None:
    here, binary = Path(__file__).parent / "cpp" / "threads_stress.cpp", tmp_path / "stress"
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # `scripts/check --asan` loads another sanitizer
    built = subprocess.run(["g++", "-O1", "-g", "-std=c++17", "-pthread", "-fsanitize=thread", f"-I{native.SOURCES}", str(here),
                            str(native.SOURCES / "step.cpp"), "-o", str(binary)], env=environment, capture_output=True, text=True,
                           check=False)
    if "tsan" in built.stderr:
        pytest.skip(f"no thread sanitizer: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([str(binary)], env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (run.returncode, run.stdout) == (0, "0 wrong\n"), run.stderr[-2000:]


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_many_tiny_kernels_give_the_same_bits_beside_a_busy_process() -> None:
    with threads(1):
        plan, _, out = chain(kernels=200, rows=33)
        expected = out.clone()
    with busy_core(min(os.sched_getaffinity(0))), threads(3):
        for _ in range(50):
            out.zero_()
            plan.replay()
            assert torch.equal(out, expected)


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_a_thread_that_never_gets_a_core_is_not_waited_for() -> None:
    with threads(2):
        plan, _, _ = chain(kernels=500, rows=33)
        plan.replay()
        core = max(os.sched_getaffinity(0))
        helpers = [int(t) for t in os.listdir("/proc/self/task") if int(t) != threading.get_native_id()]
        before = {t: os.sched_getaffinity(t) for t in helpers}
        with busy_core(core):
            try:
                for t in helpers:
                    os.sched_setaffinity(t, {core})
                    os.sched_setscheduler(t, os.SCHED_IDLE, os.sched_param(0))  # runs when nobody else wants the core, hardly ever
                began_s = time.perf_counter()
                for _ in range(10):
                    plan.replay()
                took_s = time.perf_counter() - began_s
            finally:
                for t in helpers:
                    os.sched_setscheduler(t, os.SCHED_OTHER, os.sched_param(0))
                    os.sched_setaffinity(t, before[t])
    assert took_s < HANGS_S, "5000 kernels waited for a thread that another process kept from running"


def test_a_fork_has_threads_of_its_own() -> None:
    code = """
import os, torch
from kvloom_kernels.norm import rms_norm
torch.set_num_threads(3)
x, weight = torch.randn(40, 64), torch.ones(64)
expected = rms_norm(x, weight, 1e-5)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(rms_norm(x, weight, 1e-5), expected) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_callers_at_once_do_not_disturb_each_other() -> None:
    with threads(1):
        plans = [chain(kernels=50, rows=rows) for rows in (7, 20, 33)]
        expected = [out.clone() for _, _, out in plans]
    wrong: list[int] = []

    def call(i: int) -> None:
        torch.set_num_threads(2)
        plan, _, out = plans[i]
        for _ in range(100):
            out.zero_()
            plan.replay()
            if not torch.equal(out, expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    with threads(2):
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert not wrong


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_openmp_runtime_is_loaded() -> None:
    code = """
import torch
before = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line}
from kvloom_kernels import native
native.library()
print({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line} - before)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout == "set()\n"
