"""Kernel: a Numba function that is compiled once on a machine, under a lock, and called past Numba's
dispatcher.

Compiled code is kept in a folder named by a hash of this package's sources and of the versions of Python,
Numba, LLVM and NumPy, because Numba's own cache does not notice when a function that a kernel calls is edited
in another file. Compiling happens under a file lock: Numba numbers the files of its cache without one, and
two processes that compile at once could each load the other's code.
"""

import fcntl
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba import config, njit
from numba.core.runtime import rtsys

from ..paths import cache_dir

Progress = Callable[[str, int, int], None]
SOURCES = Path(__file__).parent
MONTH = 30 * 24 * 3600
SECONDS = 1.5  # that a kernel takes to compile on an ordinary laptop


@cache
def folder() -> Path:
    """Where compiled kernels are kept: a folder in the user's cache, another one for every change of the
    sources.
    """
    seen = hashlib.sha256(
        f"{sys.version} {numba.__version__} {llvmlite.__version__} {np.__version__}".encode()
    )
    for source in sorted(SOURCES.glob("*.py")):
        seen.update(source.read_bytes())
    here = cache_dir("kernels", seen.hexdigest()[:16])
    os.utime(here)  # says that it is in use: folders that nobody used for a month are deleted
    for other in here.parent.iterdir():
        with suppress(FileNotFoundError):  # another process may be deleting it
            if other.stat().st_mtime < time.time() - MONTH:
                shutil.rmtree(other, ignore_errors=True)
    return here


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the folder's lock against other processes."""
    with open(folder() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Kernel:
    """A function to compile, for the argument types of its signature, or for those that `entry` is shown.

    Attributes
    ----------
    name : of the function.
    """

    def __init__(self, function: Callable, signature: str | None, options: dict[str, Any]) -> None:
        self.name = function.__name__
        saved, config.CACHE_DIR = config.CACHE_DIR, str(folder())
        try:
            self.dispatcher = njit(cache=True, nogil=True, **options)(function)
        finally:
            config.CACHE_DIR = saved  # the application's own functions stay where they were
        self.entries: dict[tuple, Entry] = {}
        if signature:
            types = tuple(numba.core.sigutils.normalize_signature(signature)[0])
            self.fixed = self.entries[types] = Entry(self, types)

    def entry(self, *examples: Any) -> "Entry":
        """The kernel for arguments of the examples' types; arrays are contiguous."""
        types = tuple(
            _kind(e.dtype, e.ndim) if isinstance(e, np.ndarray) else numba.typeof(e) for e in examples
        )
        return self.entries.setdefault(types, Entry(self, types))

    def __call__(self, *args: Any) -> Any:
        """Call a kernel that has a signature."""
        return self.fixed(*args)


@cache
def _kind(dtype: np.dtype, ndim: int) -> Any:
    """Numba's type of a contiguous array; `numba.typeof` takes 0.1 ms to find one of records."""
    return numba.types.Array(numba.from_dtype(dtype), ndim, "C")


class Entry:
    """A kernel for fixed argument types; compiled by the first call, unless `compile_all` did it before."""

    def __init__(self, kernel: Kernel, types: tuple) -> None:
        self.kernel, self.types = kernel, types
        self.code: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        """Call it with exactly such arguments: nothing checks them."""
        if self.code is None:
            compile_all([self], listener)
        if (calls := getattr(recorder, "calls", None)) is not None:
            calls.append((self, args))
        return self.code(*args)

    @property
    def signature(self) -> tuple:
        """Numba's types of the result and of the arguments."""
        made = self.kernel.dispatcher.overloads[self.types].fndesc
        return made.restype, made.argtypes

    @property
    def address(self) -> int:
        """Where its machine code is, once it is compiled."""
        made = self.kernel.dispatcher.overloads[self.types]
        return made.library.get_pointer_to_function(made.fndesc.llvm_func_name)

    def compile(self) -> None:
        """Make the machine code, or load it from the cache."""
        with _locked():
            self.code = self._cached() or self.kernel.dispatcher.compile(self.types)

    def _cached(self) -> Callable | None:
        """The machine code in the cache. `compile` would find it, too, but first imports all that a compiler
        needs, which takes as long as importing Numba did.
        """
        dispatcher = self.kernel.dispatcher
        rtsys.initialize(dispatcher.targetctx)
        found = dispatcher._cache._load_overload(self.types, dispatcher.targetctx)
        if found is None:
            return None
        dispatcher.add_overload(found)
        return found.entry_point


# who hears of kernels that are compiled when they are first called
listener: Progress | None = None
# the calls that this thread makes, while somebody wants to know
recorder = threading.local()


@contextmanager
def recording() -> Iterator[list[tuple[Entry, tuple]]]:
    """A list of the calls (entry, arguments) that are made within."""
    recorder.calls = calls = []
    try:
        yield calls
    finally:
        recorder.calls = None


def compile_all(entries: Iterable[Entry], progress: Progress | None) -> None:
    """Compile those that are not yet, and report each."""
    waiting = [e for e in entries if e.code is None]
    stage = f"compiling kernels for this CPU, once, about {SECONDS * len(waiting):.0f} s"
    for i, entry in enumerate(waiting):
        if progress:
            progress(stage, i, len(waiting))
        entry.compile()
    if progress and waiting:
        progress(stage, len(waiting), len(waiting))


def kernel(signature: str | None = None, **options: Any) -> Callable[[Callable], Kernel]:
    """Make a Kernel of a function, with Numba's options, such as ``fastmath``."""
    return lambda function: Kernel(function, signature, options)
