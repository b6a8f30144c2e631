"""How many threads compute: one for each fast core that this process may use.

    affinity     the CPUs that the process may run on
    siblings     hyper-threads of a core share its vector units: one of them counts
    classes      where cores differ (big.LITTLE, Intel's P and E), only the fast ones count
    cgroup       a quota of CPU time, of this group or of one around it, bounds the rest

A slow core that took part would hold up the fast ones at the end of every product.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

FAST = 0.5  # of the fastest core's capacity; clusters of big cores differ by less, little ones by more


class Found(NamedTuple):
    """What there is to compute with.

    Attributes
    ----------
    logical : CPUs that the process may run on.
    physical : cores of these, hyper-threads counted once.
    fast : cores of these that are not of a slower class.
    quota : CPUs that the cgroups' limits are worth; None without a limit.
    """

    logical: int
    physical: int
    fast: int
    quota: float | None

    @property
    def threads(self) -> int:
        """As many as compute fastest; a part of a CPU's time is worth a thread."""
        return self.fast if self.quota is None else max(1, min(self.fast, -int(-self.quota // 1)))


def cores() -> int:
    """Threads that compute where nobody says how many."""
    return find().threads


def find() -> Found:
    """What this process may use of this machine."""
    if sys.platform == "darwin":
        return on_macos(_sysctl)
    if hasattr(os, "sched_getaffinity"):
        return on_linux(os.sched_getaffinity(0), Path("/"))
    count = os.cpu_count() or 1
    return Found(count, count, count, None)


def on_linux(allowed: Iterable[int], root: Path) -> Found:
    """What /sys and /proc below `root` tell of the allowed CPUs."""
    cpus = sorted(allowed)
    devices = root / "sys/devices"
    performance = _cpu_list(_read(devices / "cpu_core/cpus"))  # Intel's hybrid CPUs name their P cores
    fast = [cpu for cpu in cpus if cpu in performance] or _fastest(devices, cpus)
    physical, fast_physical = (len({_core(devices, cpu) for cpu in some}) for some in (cpus, fast))
    return Found(len(cpus), physical, fast_physical, _quota(root))


def _fastest(devices: Path, cpus: list[int]) -> list[int]:
    """CPUs of the fast classes; all where the capacity of one is not told."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        told = [_read(devices / f"system/cpu/cpu{cpu}" / name) for cpu in cpus]
        if all(text.isdecimal() for text in told):
            capacity = list(map(int, told))
            return [cpu for cpu, c in zip(cpus, capacity, strict=True) if c >= FAST * max(capacity)]
    return cpus


def _core(devices: Path, cpu: int) -> str:
    """The physical core of a logical CPU, as the list of its hyper-threads."""
    topology = devices / f"system/cpu/cpu{cpu}/topology"
    return _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list") or str(cpu)


def _quota(root: Path) -> float | None:
    """CPUs that the cgroup of this process may use, and those around it; None without a limit.

    A container may see the host's path, below which nothing is there; its own group is then the root.
    """
    limits = []
    groups = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = groups if not controllers else groups / "cpu"
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for n in range(len(parts) + 1):
            folder = base.joinpath(*parts[:n])
            if controllers:  # version 1
                quota, period = (_read(folder / f"cpu.cfs_{x}_us") for x in ("quota", "period"))
            else:
                quota, _, period = _read(folder / "cpu.max").partition(" ")
            if quota.isdecimal() and period.isdecimal() and int(period):  # else "max", -1, or not there
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _cpu_list(text: str) -> set[int]:
    """CPUs of a list such as 0-3,8."""
    ends = [part.split("-") for part in text.split(",") if part]
    return {cpu for end in ends for cpu in range(int(end[0]), int(end[-1]) + 1)}


def _read(path: Path) -> str:
    """A file's text without the space around it; empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def on_macos(sysctl: Callable[[str], int]) -> Found:
    """What the kernel's values tell; level 0 are the performance cores, and an Intel Mac has no levels."""
    logical, physical = sysctl("hw.logicalcpu") or os.cpu_count() or 1, sysctl("hw.physicalcpu")
    physical = physical or logical
    return Found(logical, physical, sysctl("hw.perflevel0.physicalcpu") or physical, None)


def _sysctl(name: str) -> int:
    """One of macOS's integers, 0 if it has none by that name."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    libc = ctypes.CDLL(None)
    failed = libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else value.value
