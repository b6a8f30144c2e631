"""The machine: which vector instructions the kernels use.

A path is a set of instructions for the inner product of unsigned and signed bytes. It is chosen from the
features that Numba compiles for: the host's, or NUMBA_CPU_FEATURES where that is set (with it a path can be
forced).
"""

import ctypes
import platform
from functools import cache
from typing import NamedTuple

import llvmlite.binding as llvm
from numba import config

from .cores import find


class Path(NamedTuple):
    """How `simd` computes.

    Attributes
    ----------
    name : as `edgeq doctor` prints it.
    needs : LLVM's names of the features that must all be there.
    bits : width of one integer dot-product instruction.
    tokens : tokens that share each unpacked weight in a product of many tokens, as the registers allow.
    half : the instructions convert float16.
    amx : products of many tokens run on the matrix unit.
    """

    name: str
    needs: frozenset[str]
    bits: int
    tokens: int
    half: bool = True
    amx: bool = False


_VNNI = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c"})
_AMX = frozenset({"avx512bf16", "amx-tile", "amx-bf16"})
PATHS = (
    Path("avx512-vnni-amx", _VNNI | _AMX, 512, 8, amx=True),
    Path("avx512-vnni", _VNNI, 512, 8),
    Path("avx-vnni", frozenset({"avx2", "avxvnni", "fma", "f16c"}), 256, 2),
    Path("avx2", frozenset({"avx2", "fma", "f16c"}), 256, 2),
    Path("arm-dotprod", frozenset({"neon", "dotprod"}), 128, 2),
    Path("plain", frozenset(), 0, 1, half=False),
)


def features() -> frozenset[str]:
    """Names of the CPU features that Numba compiles for, as LLVM calls them."""
    if config.CPU_FEATURES is not None:
        have = {f[1:] for f in config.CPU_FEATURES.split(",") if f.startswith("+")}
    else:
        have = {name for name, there in llvm.get_host_cpu_features().items() if there}
        if platform.machine() in ("aarch64", "arm64") and _arm_has_dot_product():
            have |= {"neon", "dotprod"}
    return frozenset(have if have >= _AMX and _amx_allowed() else have - _AMX)


@cache
def _amx_allowed() -> bool:
    """Whether Linux gives this process AMX's eight kilobytes of registers, for which a process must ask."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return platform.system() == "Linux" and ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def _arm_has_dot_product() -> bool:
    """Whether an ARM CPU multiplies bytes four at a time; LLVM's list of the host's features leaves that out.

    What LLVM knows by the CPU's name it also compiles, so a name is needed, too.
    """
    if llvm.get_host_cpu_name() == "generic":
        return False
    if platform.system() == "Darwin":
        return True  # every Mac with an ARM CPU
    try:
        with open("/proc/cpuinfo") as f:
            return any("asimddp" in line.split() for line in f if line.startswith("Features"))
    except OSError:
        return False


def path() -> Path:
    """The best path that the features allow."""
    have = features()
    return next(p for p in PATHS if p.needs <= have)


def describe() -> dict[str, object]:
    """What `edgeq doctor` reports of the machine and of Numba's settings."""
    chosen, found = path(), find()
    known = frozenset().union(*(p.needs for p in PATHS))
    return {
        "machine": platform.machine(),
        "cpu": llvm.get_host_cpu_name() if config.CPU_NAME is None else config.CPU_NAME,
        "path": chosen.name,
        "features": sorted(known & features()),
        "threads": found.threads,
        "threading": "a pool of edgeq's own",
        "logical_cpus": found.logical,
        "physical_cores": found.physical,
        "fast_cores": found.fast,
        "cgroup_cpus": found.quota,
        "llvm": ".".join(map(str, llvm.llvm_version_info)),
    }
