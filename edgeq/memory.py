"""Memory: what a model will take, and how much there is."""

import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import arch, kernels
from .arch import config
from .arch.weights import Weights
from .tensor import Tensor

# Measured with the models of the catalog: all that is resident before a model's file is read, and what the
# libraries take of their own once they compute. Numba and LLVM are half of it.
PROGRAM = {"numba": 140 << 20, "numpy": 70 << 20}
TOKEN = 300  # bytes of a token in Python's objects: 250 with SentencePiece's scores, 340 with merges


class Estimate(NamedTuple):
    """Bytes that a model takes, once its kernels are compiled.

    Attributes
    ----------
    weights : the matrices, as the backend keeps them.
    program : Python, libraries, kernels and vocabulary.
    cache : keys and values of a full context.
    work : results of the layers, for the longest chunk of a prompt.
    """

    weights: int
    program: int
    cache: int
    work: int

    @property
    def loaded(self) -> int:
        """What is taken before the context fills."""
        return self.weights + self.program

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def shape(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], path: object) -> config.Config:
    """Layers, heads and so on of a model that edgeq runs; FormatError for any other."""
    _, meta, tensors = arch.identify(meta, tensors, path)
    return config.read(meta, Weights(tensors, kernels, path).vocab_size(), path, interleaved=True)


def estimate(
    c: config.Config,
    tensors: Mapping[str, Tensor],
    *,
    backend: str,
    ctx: int,
    cache_types: tuple[str | None, str | None] = (None, None),
) -> Estimate:
    """Memory for a model of this shape with a context of `ctx` tokens."""
    unread = "token_embd.weight" if "output.weight" in tensors else ""  # looked up in the file
    matrices = [t for name, t in tensors.items() if len(t.shape) == 2 and name != unread]
    if backend == "numpy":
        weights = sum(t.rows * t.cols * 4 for t in matrices)
    else:
        weights = sum(t.nbytes for t in matrices)
    widths = 3 * c.dim + 2 * (c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.ffn
    return Estimate(
        weights,
        PROGRAM[backend] + TOKEN * c.vocab_size,
        c.cache_bytes(ctx, *kernels.cache_types(backend, *cache_types)),
        4 * (min(arch.CHUNK, ctx) * widths + 2 * c.vocab_size),
    )


def peak() -> int:
    """Most bytes of memory that this process has held so far."""
    try:  # what getrusage says begins, on Linux, with the memory of the process that started this one
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available() -> int:
    """Bytes that can be allocated without swapping; all memory where the system does not say (macOS)."""
    try:
        with open("/proc/meminfo") as f:
            fields = dict(line.split(":", 1) for line in f)
        free = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # a container's share; files that it has read can be dropped from its account
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no cgroup v2, or its limit is "max"
        return free
