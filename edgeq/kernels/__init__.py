"""The forward pass's operations, in two backends that offer the same functions.

    numpy_backend   readable, exact, float32 from the unpacked weights: specification and auditor's path
    numba_backend   integer kernels on prepared lanes: the fast path

A backend is a module with

    linear(tensors, bias, batches, release) -> f   f(x) = x @ Wᵀ + b, the rows of several tensors stacked
    embedding(tensor) -> f         f(ids) = rows of the table
    rms_norm(x, weight, eps)
    attention(qkv, caches, layer, heads)
    gated(gate_up, activation)     silu(gate) * up, or gelu(gate) * up
    add(x, y)
    dot(a, b)                      a @ b of matrices that change from call to call
    gram(x)                        xᵀ x of inputs, whose numbers may be rounded to bfloat16 for it
    low_rank(a, b) -> f            f(x, y) = y + x @ aᵀ @ bᵀ
    again(caches, what, x, f)      f(x), which comes again and again for the same sequences
    ready(progress)                compile what the above will run
    computing(threads)             a context in which that many threads compute
    CACHE_TYPES                    that keys and values may have, the usual one first
"""

import importlib
from collections.abc import Callable
from types import ModuleType

from .cores import cores as cores

BACKENDS = ("numba", "numpy")


def backend(name: str) -> ModuleType:
    """The backend's module; it is the import of ``numba_backend`` that loads Numba."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; edgeq has {', '.join(BACKENDS)}")
    return importlib.import_module(f"{__name__}.{name}_backend")


def cache_types(name: str, keys: str | None, values: str | None) -> tuple[str, str]:
    """Types of a backend's keys and values, the usual one for None; ValueError for one that it lacks."""
    have = backend(name).CACHE_TYPES
    keys, values = keys or have[0], values or have[0]
    for kind in (keys, values):
        if kind not in have:
            raise ValueError(f"a cache of {kind!r}; on this machine the {name} backend has {', '.join(have)}")
    return keys, values


def warmup(progress: Callable[[str, int, int], None] | None = None) -> None:
    """Compile every kernel for this machine: all formats, for one token and for many."""
    ops = backend("numba")
    ops.want_everything()
    ops.ready(progress)
