"""Threads are as many as cores that this process may use: affinity and the quotas of its control groups, unless the user said a number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvloom.runtime.host_cores import HostCores, host_cores
from kvloom.runtime.threads import VARIABLES, choose_threads

EIGHT = frozenset(range(8))
V1, V2 = "sys/fs/cgroup/cpu", "sys/fs/cgroup"


def machine(root: Path, cgroup: str, files: dict[str, object]) -> Path:
    for name, content in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(content))
    return root


@pytest.mark.parametrize(("cgroup", "files", "quota", "threads"), [
    ("", {}, None, 8),
    ("0::/\n", {f"{V2}/cpu.max": "max 100000"}, None, 8),
    ("0::/pod/box\n", {f"{V2}/pod/box/cpu.max": "400000 100000", f"{V2}/pod/cpu.max": "max 100000"}, 4.0, 4),
    ("0::/pod/box\n", {f"{V2}/pod/box/cpu.max": "400000 100000", f"{V2}/pod/cpu.max": "100000 50000"}, 2.0, 2),  # the one around it
    ("0::/a\n", {f"{V2}/a/cpu.max": "150000 100000"}, 1.5, 2),
    ("0::/a\n", {f"{V2}/a/cpu.max": "10000 100000"}, 0.1, 1),
    ("0::/a\n", {f"{V2}/a/cpu.max": "6400000 100000"}, 64.0, 8),
    ("0::/a\n", {f"{V2}/a/cpu.max": ""}, None, 8),
    ("0::/path/of/the/host\n", {f"{V2}/cpu.max": "300000 100000"}, 3.0, 3),
    ("3:memory:/x\n1:cpu:/job/step\n0::/\n", {f"{V1}/job/step/cpu.cfs_quota_us": -1, f"{V1}/job/step/cpu.cfs_period_us": 100000,
                                             f"{V1}/job/cpu.cfs_quota_us": 250000, f"{V1}/job/cpu.cfs_period_us": 100000}, 2.5, 3),
    ("4:cpu,cpuacct:/job\n", {f"{V2}/cpu,cpuacct/job/cpu.cfs_quota_us": 200000, f"{V2}/cpu,cpuacct/job/cpu.cfs_period_us": 100000}, 2.0, 2),
    ("1:memory:/\n0::/a\n", {f"{V2}/unified/a/cpu.max": "200000 100000"}, 2.0, 2),  # both versions side by side
])
def test_the_least_quota_around_this_process_bounds_the_threads(
        tmp_path: Path, cgroup: str, files: dict[str, object], quota: float | None, threads: int) -> None:
    cores = host_cores(machine(tmp_path, cgroup, files), EIGHT)
    assert (cores.allowed, cores.quota, cores.threads) == (8, quota, threads)


def test_affinity_bounds_them_too(tmp_path: Path) -> None:
    cores = host_cores(machine(tmp_path, "0::/a\n", {f"{V2}/a/cpu.max": "400000 100000"}), frozenset({3, 5}))
    assert (cores.allowed, cores.threads) == (2, 2)


def test_second_threads_of_a_core_are_not_physical(tmp_path: Path) -> None:
    topology = {f"sys/devices/system/cpu/cpu{i}/topology/{name}": value
                for i in range(8) for name, value in (("physical_package_id", i // 4), ("core_id", i % 2))}
    assert host_cores(machine(tmp_path, "", topology), EIGHT) == HostCores(8, 4)
    assert host_cores(machine(tmp_path / "none", "", {}), EIGHT) == HostCores(8, 8)


def test_this_machine() -> None:
    cores = host_cores()
    assert 1 <= cores.threads <= cores.allowed <= (os.cpu_count() or 1)
    assert 1 <= cores.physical <= cores.allowed


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("unset")
def test_a_quota_lowers_what_torch_takes_by_itself() -> None:
    torch.set_num_threads(6)
    assert choose_threads(HostCores(6, 6, 2.5)) == "threads: 3 (6 cores, 2.5 of them by its control groups' quota)"
    assert torch.get_num_threads() == 3
    torch.set_num_threads(3)  # what torch takes where two threads share a core
    assert choose_threads(HostCores(6, 3, 2.0)) == "threads: 2 (6 cores, 2 of them by its control groups' quota)"


@pytest.mark.usefixtures("unset")
def test_physical_cores_are_left_as_torch_takes_them() -> None:
    torch.set_num_threads(3)
    assert choose_threads(HostCores(6, 3)) == "threads: 3 (6 cores)"


@pytest.mark.usefixtures("unset")
def test_a_number_that_the_user_set_stays() -> None:
    torch.set_num_threads(5)
    assert choose_threads(HostCores(6, 6, 2.0)) == "threads: 5 by torch.set_num_threads (6 cores, 2 of them by its control groups' quota)"
    assert torch.get_num_threads() == 5


@pytest.mark.usefixtures("unset")
def test_a_number_from_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    torch.set_num_threads(6)
    assert choose_threads(HostCores(6, 6, 2.0)) == "threads: 6 by OMP_NUM_THREADS (6 cores, 2 of them by its control groups' quota)"
    assert torch.get_num_threads() == 6
