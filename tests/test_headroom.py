"""Memory that can still be had: the machine's, or what a control group leaves of it; and the many ways in which its end is told."""

from __future__ import annotations

from pathlib import Path
from typing import Dict

from latentd import headroom

MIB = 1 << 20
MEMINFO = "MemTotal:        6996988 kB\nMemFree:          120000 kB\nMemAvailable:    3072000 kB\nHugePages_Total:       0\n"


def tree(root: Path, files: Dict[str, object]) -> Path:
    for name, content in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def test_without_a_limit_it_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    found = headroom.read(tree(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}))
    assert found == (3000 * MIB, 6996988 << 10, "the machine")


def test_a_limit_of_the_service_counts_where_it_is_nearer_and_its_file_cache_does_not(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/system.slice/latentd.service"
    files = {
        "proc/self/cgroup": "0::/system.slice/latentd.service",
        f"{group}/memory.max": 2000 * MIB,
        f"{group}/memory.high": 1500 * MIB,
        f"{group}/memory.current": 1400 * MIB,
        f"{group}/memory.stat": f"anon {1000 * MIB}\ninactive_file {300 * MIB}\nactive_file {100 * MIB}",
    }
    half_of_what_is_in_use = 50 * MIB
    assert headroom.read(tree(tmp_path, files)) == (400 * MIB + half_of_what_is_in_use, 1500 * MIB, "the control group latentd.service")


def test_a_limit_of_a_slice_above_counts_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/edge.slice/latentd.service",
        "sys/fs/cgroup/edge.slice/latentd.service/memory.max": "max",
        "sys/fs/cgroup/edge.slice/memory.max": 1000 * MIB,
        "sys/fs/cgroup/edge.slice/memory.current": 900 * MIB,
    }
    assert headroom.read(tree(tmp_path, files)).available_bytes == 100 * MIB


def test_ubuntu_20_still_has_the_old_control_groups(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/system.slice/latentd.service"
    files = {
        "proc/self/cgroup": "9:cpu,cpuacct:/\n4:memory:/system.slice/latentd.service\n0::/system.slice/latentd.service",
        f"{group}/memory.limit_in_bytes": 1000 * MIB,
        f"{group}/memory.usage_in_bytes": 700 * MIB,
        f"{group}/memory.stat": f"inactive_file 1\ntotal_inactive_file {200 * MIB}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
    }
    assert headroom.read(tree(tmp_path, files)).available_bytes == 500 * MIB


def test_in_a_container_the_path_may_be_the_hosts_and_only_its_top_is_there(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/0123abcd",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 1000 * MIB,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 100 * MIB,
    }
    assert headroom.read(tree(tmp_path, files)).available_bytes == 900 * MIB


def test_a_limit_that_is_farther_than_the_machines_end_does_not_count(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": 6000 * MIB, "sys/fs/cgroup/memory.current": 0}
    assert headroom.read(tree(tmp_path, files)) == (3000 * MIB, 6996988 << 10, "the machine")


def test_a_group_above_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.high": 100 * MIB, "sys/fs/cgroup/memory.current": 150 * MIB}
    assert headroom.read(tree(tmp_path, files)).available_bytes == 0


def test_a_system_that_does_not_tell_is_unknown_and_not_empty(tmp_path: Path) -> None:
    assert headroom.read(tmp_path) == (None, None, "the machine")
    assert headroom.resident_bytes(tmp_path) is None


def test_what_this_process_holds_is_known_on_linux() -> None:
    held = headroom.resident_bytes()
    assert held is not None
    assert held > MIB
