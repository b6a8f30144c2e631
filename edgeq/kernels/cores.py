"""How many threads compute: one for each core that this process may use."""

import os


def cores() -> int:
    """Cores this process may use: within its affinity and its cgroup's share, one for hyper-threaded
    siblings.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        cores = {_core(cpu) for cpu in allowed}
        count = len(cores)
    else:
        count = os.cpu_count() or 1
    return max(1, min(count, _cgroup_cpus()))


def _core(cpu: int) -> str:
    """The physical core of a logical CPU, as the list of its hyper-threaded siblings."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as f:
            return f.read().strip()
    except OSError:
        return str(cpu)


def _cgroup_cpus() -> int:
    """CPUs that the cgroup's quota is worth, rounded up; a large number without a quota."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as f:
            quota, period = f.read().split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return 1 << 20
