"""Kernel: a Numba function that is compiled once on a machine, under a lock, and called past Numba's
dispatcher.

Compiled code is kept in a folder named by a hash of this package's sources and of the versions of Python,
Numba, LLVM and NumPy, because Numba's own cache does not notice when a function that a kernel calls is edited
in another file. A file lock lets one process compile what others wait for.
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

import llvmlite.binding
import numba
import numpy as np
from numba import config, njit

from ..paths import cache_dir
from . import host, native
from .native import Code

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
        options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # see native.py
        self.dispatcher = njit(nogil=True, **options)(function)
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

    def __call__(self, *args: Any) -> None:
        """Call a kernel that has a signature."""
        self.fixed(*args)


@cache
def _kind(dtype: np.dtype, ndim: int) -> Any:
    """Numba's type of a contiguous array; `numba.typeof` takes 0.1 ms to find one of records."""
    return numba.types.Array(numba.from_dtype(dtype), ndim, "C")


class Entry:
    """A kernel for fixed argument types; compiled by the first call, unless `compile_all` did it before."""

    def __init__(self, kernel: Kernel, types: tuple) -> None:
        self.kernel, self.types = kernel, types
        self.code: Code | None = None

    def __call__(self, *args: Any) -> None:
        """Call it with exactly such arguments: nothing checks them."""
        if self.code is None:
            compile_all([self], listener)
        if (calls := getattr(recorder, "calls", None)) is not None:
            calls.append((self, args))
        words = native.words(args)
        if status := self.code.call(words.buffer_info()[0], 0):
            raise RuntimeError(f"kernel {self.kernel.name} raised an exception, of status {status}")

    def compile(self) -> None:
        """Make the machine code, or load it from the cache."""
        key = f"{self.kernel.dispatcher.py_func.__module__} {self.types} {target()}"
        file = folder() / f"{self.kernel.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.o"
        if not file.exists():
            with _locked():
                if not file.exists():  # another process may have made it meanwhile
                    self.kernel.dispatcher.compile(self.types)
                    made = file.with_suffix(".new")
                    made.write_bytes(native.emit(self.kernel.dispatcher.overloads[self.types]))
                    made.rename(file)
        self.code = Code(file.read_bytes())


@cache
def target() -> tuple[object, ...]:
    """The processor that code is made for: a home folder may be seen by several."""
    return config.CPU_NAME or llvmlite.binding.get_host_cpu_name(), *sorted(host.features())


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
