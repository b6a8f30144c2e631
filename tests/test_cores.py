"""How many threads compute by default, on made-up machines: trees of /sys and /proc as Linux has them."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from edgeq.kernels.cores import Found, _sysctl, cores, find, on_linux, on_macos


def machine(root: Path, files: Mapping[str, object]) -> Path:
    """A root folder with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def each_cpu(name: str, values: list[object]) -> dict[str, object]:
    """A file in every CPU's folder."""
    return {f"sys/devices/system/cpu/cpu{i}/{name}": value for i, value in enumerate(values)}


SIBLINGS = "topology/core_cpus_list"
FOUR_CORES = each_cpu(SIBLINGS, ["0,4", "1,5", "2,6", "3,7"] * 2)
ALDER_LAKE = {  # 12600K: six P cores of two hyper-threads, four E cores
    "sys/devices/cpu_core/cpus": "0-11",
    "sys/devices/cpu_atom/cpus": "12-15",
    **each_cpu(SIBLINGS, [f"{i - i % 2}-{i - i % 2 + 1}" for i in range(12)] + [12, 13, 14, 15]),
    **each_cpu("cpufreq/cpuinfo_max_freq", [4900000] * 12 + [3600000] * 4),
}
RK3588 = each_cpu("cpu_capacity", [414] * 4 + [1024] * 4)
PIXEL_7 = each_cpu("cpu_capacity", [155] * 4 + [600] * 2 + [1024] * 2)


@pytest.mark.parametrize(
    ("files", "allowed", "expected"),
    [
        ({}, range(3), Found(3, 3, 3, None)),
        (FOUR_CORES, range(8), Found(8, 4, 4, None)),
        (FOUR_CORES, [1, 5, 6], Found(3, 2, 2, None)),
        (each_cpu("topology/thread_siblings_list", ["0-1", "0-1"]), range(2), Found(2, 1, 1, None)),
        (ALDER_LAKE, range(16), Found(16, 10, 6, None)),
        (ALDER_LAKE, [0, 1, 14, 15], Found(4, 3, 1, None)),
        (ALDER_LAKE, range(12, 16), Found(4, 4, 4, None)),
        ({"sys/devices/cpu_core/cpus": "0-1,4"}, range(6), Found(6, 6, 3, None)),
        (RK3588, range(8), Found(8, 8, 4, None)),
        (RK3588, range(4), Found(4, 4, 4, None)),
        (PIXEL_7, range(8), Found(8, 8, 4, None)),
        # a few cores that may run a little faster than the rest make no class
        (each_cpu("cpufreq/cpuinfo_max_freq", [5700000, 5700000, 5200000]), range(3), Found(3, 3, 3, None)),
        (each_cpu("cpufreq/cpuinfo_max_freq", [2400000, 2400000, 600000]), range(3), Found(3, 3, 2, None)),
        (each_cpu("cpu_capacity", [1024]), range(3), Found(3, 3, 3, None)),
    ],
)
def test_cores_of_a_machine(
    tmp_path: Path, files: Mapping[str, object], allowed: list[int], expected: Found
) -> None:
    assert on_linux(allowed, machine(tmp_path, files)) == expected


V1 = "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x/y\n1:name=systemd:/docker/x"


def version_1(folder: str, quota: int) -> dict[str, object]:
    """A cgroup's files of version 1."""
    return {f"cpu/{folder}cpu.cfs_quota_us": quota, f"cpu/{folder}cpu.cfs_period_us": 100000}


@pytest.mark.parametrize(
    ("groups", "limits", "quota", "threads"),
    [
        ("0::/", {}, None, 8),
        ("0::/", {"cpu.max": "max 100000"}, None, 8),
        ("0::/", {"cpu.max": "200000 100000"}, 2, 2),
        ("0::/", {"cpu.max": "1200000 100000"}, 12, 8),
        ("0::/", {"cpu.max": "100000 0"}, None, 8),
        ("0::/", {"cpu.max": ""}, None, 8),
        ("0::/a/b", {"a/b/cpu.max": "50000 100000"}, 0.5, 1),
        # the narrowest of the groups around it counts
        ("0::/a/b", {"a/cpu.max": "250000 100000", "a/b/cpu.max": "max 100000"}, 2.5, 3),
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "60000 20000"}, 3, 3),
        # seen from a container
        ("0::/../../other", {"cpu.max": "300000 100000"}, 3, 3),
        ("0::/host/path", {"cpu.max": "300000 100000"}, 3, 3),
        (V1, version_1("", -1), None, 8),
        (V1, version_1("", 150000), 1.5, 2),
        (V1, version_1("docker/x/", 100000) | version_1("docker/x/y/", -1), 1, 1),
        ("4:cpuset:/\n0::/", version_1("", 100000), None, 8),
    ],
)
def test_a_quota_bounds_the_threads(
    tmp_path: Path, groups: str, limits: Mapping[str, object], quota: float | None, threads: int
) -> None:
    machine(tmp_path, {"proc/self/cgroup": groups})
    machine(tmp_path / "sys/fs/cgroup", limits)
    found = on_linux(range(8), tmp_path)
    assert (found.quota, found.threads) == (quota, threads)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # an M1, and a Mac of Intel's
        ({"hw.logicalcpu": 8, "hw.physicalcpu": 8, "hw.perflevel0.physicalcpu": 4}, Found(8, 8, 4, None)),
        ({"hw.logicalcpu": 8, "hw.physicalcpu": 4}, Found(8, 4, 4, None)),
    ],
)
def test_macs(values: dict[str, int], expected: Found) -> None:
    assert on_macos(lambda name: values.get(name, 0)) == expected


def test_a_mac_that_tells_nothing() -> None:
    count = os.cpu_count()
    assert on_macos(lambda name: 0) == Found(count, count, count, None)


def test_this_machine() -> None:
    found = find()
    assert 1 <= found.fast <= found.physical <= found.logical <= os.cpu_count()
    assert 1 <= cores() == found.threads <= found.fast
    if sys.platform == "darwin":
        assert _sysctl("hw.physicalcpu") == found.physical
        assert _sysctl("hw.nothing") == 0
