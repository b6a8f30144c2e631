"""Kernel: a Numba function that is compiled once a machine, under a lock, and called without Numba's dispatcher.

Compiled code is kept in a folder named by a hash of this package's sources and of the versions of Python, Numba, LLVM
and NumPy, because Numba's own cache does not notice when a function that a kernel calls is edited in another file.
Compiling happens under a file lock: Numba numbers the files of its cache without one, and two processes that
compile at once could each load the other's code.
"""

import hashlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba import config, njit

from ..paths import cache_dir

KERNELS: list["Kernel"] = []
PACKAGE = Path(__file__).parents[1]


@cache
def folder() -> Path:
    """Where compiled kernels are kept: a folder in the user's cache, another one for every change of the sources."""
    seen = hashlib.sha256(
        f"{sys.version} {numba.__version__} {llvmlite.__version__} {np.__version__}".encode()
    )
    for source in sorted((PACKAGE / "kernels").glob("*.py")):
        seen.update(source.read_bytes())
    return cache_dir("kernels", seen.hexdigest()[:16])


@contextmanager
def _locked():
    """Hold the folder's lock against other processes, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # not a Unix: only threads are kept apart, by Numba's own compiler lock
        yield
        return
    with open(folder() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Kernel:
    """A compiled function; `types` fixes its argument types once and for all, or `entry` is asked for them.

    Attributes
    ----------
    name : of the function, for progress messages.
    """

    def __init__(self, function: Callable, signature: str | None, options: dict[str, Any]) -> None:
        self.name, self.signature = function.__name__, signature
        self.entries: dict[tuple, Callable] = {}
        saved, config.CACHE_DIR = config.CACHE_DIR, str(folder())
        try:
            self.dispatcher = njit(cache=True, nogil=True, **options)(function)
        finally:
            config.CACHE_DIR = saved  # the application's own functions stay where they were
        self.fixed: Callable | None = None
        KERNELS.append(self)

    def entry(self, *examples: Any) -> Callable:
        """The machine code for arguments of the examples' types; call it with exactly such arguments."""
        return self.compile(tuple(numba.typeof(e) for e in examples))

    def compile(self, types: tuple) -> Callable:
        """The machine code for these Numba types, from the cache where it is there."""
        if types not in self.entries:
            with _locked():
                self.entries[types] = self.dispatcher.compile(types)
        return self.entries[types]

    def __call__(self, *args: Any) -> Any:
        """Call a kernel that has a fixed signature."""
        if self.fixed is None:
            self.fixed = self.compile(tuple(numba.core.sigutils.normalize_signature(self.signature)[0]))
        return self.fixed(*args)


def kernel(signature: str | None = None, **options: Any) -> Callable[[Callable], Kernel]:
    """Make a Kernel of a function, with Numba's options (``parallel``, ``fastmath``)."""
    return lambda function: Kernel(function, signature, options)


THREADS = threading.local()


def use_threads(count: int) -> None:
    """Let the calling thread's next kernels run on that many threads."""
    if getattr(THREADS, "count", None) != count:
        numba.set_num_threads(min(count, config.NUMBA_NUM_THREADS))
        THREADS.count = count


def threading_layer() -> str:
    """Numba's threading layer in use: omp, tbb or workqueue."""
    try:
        return numba.threading_layer()
    except ValueError:  # no parallel kernel has run yet
        return "not started"


def cached_bytes() -> int:
    """Size of the compiled kernels in the cache."""
    return sum(
        e.stat().st_size for root, _, files in os.walk(folder()) for e in (Path(root) / f for f in files)
    )
