"""What a process may still use: the machine's free memory, or less where a control group says so."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from kvloom.runtime.host_memory import DeviceMemory, host_memory

GIB = 2**30


def machine(root: Path, cgroup: str, files: dict[str, object]) -> Path:
    all_files = {
        "proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {32 * 2**20} kB\n",
        "proc/self/status": f"Name:\tpython\nRssAnon:\t{2**20} kB\n",
        "proc/self/cgroup": cgroup,
        **files,
    }
    for name, content in all_files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(content))
    return root


def test_without_groups_it_is_what_the_machine_has_available(tmp_path: Path) -> None:
    memory = host_memory(machine(tmp_path, "", {}))
    assert memory == DeviceMemory(64 * GIB, 32 * GIB, GIB)
    assert memory.held_by_others_bytes == 31 * GIB


def test_version_2_counts_every_group_on_the_way_up_and_cache_that_can_be_dropped(tmp_path: Path) -> None:
    base = "sys/fs/cgroup"
    memory = host_memory(machine(tmp_path, "0::/pod/box\n", {
        f"{base}/pod/memory.max": 8 * GIB, f"{base}/pod/memory.current": 6 * GIB,
        f"{base}/pod/memory.stat": f"inactive_file {GIB}\n",
        f"{base}/pod/box/memory.max": "max\n", f"{base}/pod/box/memory.current": GIB,
    }))
    assert (memory.total_bytes, memory.free_bytes) == (8 * GIB, 3 * GIB)


def test_version_1_ignores_other_controllers_and_its_number_for_no_limit(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    memory = host_memory(machine(tmp_path, "9:cpu,cpuacct:/x\n4:memory:/job\n", {
        f"{base}/memory.limit_in_bytes": 9223372036854771712, f"{base}/memory.usage_in_bytes": 5 * GIB,
        f"{base}/job/memory.limit_in_bytes": 4 * GIB, f"{base}/job/memory.usage_in_bytes": 3 * GIB,
        f"{base}/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
    }))
    assert (memory.total_bytes, memory.free_bytes) == (4 * GIB, GIB + GIB // 2)


def test_in_a_container_whose_path_is_the_hosts_the_mount_itself_counts(tmp_path: Path) -> None:
    memory = host_memory(machine(tmp_path, "0::/host/path/of/it\n", {
        "sys/fs/cgroup/memory.max": 2 * GIB, "sys/fs/cgroup/memory.current": GIB,
    }))
    assert memory.free_bytes == GIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    memory = host_memory(machine(tmp_path, "0::/\n", {"sys/fs/cgroup/memory.max": GIB, "sys/fs/cgroup/memory.current": 2 * GIB}))
    assert memory.free_bytes == 0


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc")
def test_this_machine() -> None:
    memory = host_memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert 0 < memory.own_bytes <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
