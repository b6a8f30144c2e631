"""y += B A x for one token: what adapters add to a linear, in one job of the pool.

Two thin products take less time than the threads need to meet in between, so here they do not: units of A
come before those of B, and whoever takes one of B finds h = A x there, or about to be.

    units of A    some columns each: a share of h; the last to be done adds the shares up
    units of B    some groups of sixteen rows each

Matrices that are stacked have pairs of their own, so a group of rows has a span of h that it needs, and B is
zero elsewhere: only what is in the spans is kept, one after the other.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from . import pool, simd
from .jit import kernel
from .lanes import ROWS
from .matmul import share
from .pool import atomic_add, atomic_load, atomic_store, job, pause, run

UNIT_BYTES = 1 << 14  # of a matrix, that a thread takes at a time
AHEAD = 640  # weights that are asked for ahead of their use
zero = simd.make_zero(1)


class LowRank:
    """y + B A x for x f32 (n, cols) and y f32 (n, rows), which a single token's result may overwrite.

    down, up : the linears A (r, cols) and B (rows, r), of floats; used as they are for more tokens than one.
    add : the backend's.
    """

    def __init__(self, down: Any, up: Any, add: Callable) -> None:
        self.down, self.up, self.add = down, up, add
        (a,), (wide,) = ([product.w for product in linear.products] for linear in (down, up))
        b, groups = spans(wide)
        shares = max(1, min(a.nbytes // UNIT_BYTES, a.shape[1]))  # whatever the number of threads
        units = shares + max(1, min(b.nbytes // UNIT_BYTES, len(groups)))
        parts, done = np.zeros((shares, ROWS * len(a)), np.float32), np.zeros(1, np.int64)
        self.given = units, a.reshape(-1, ROWS), b, groups, parts, done
        x, y = np.zeros((1, down.cols), np.float32), np.zeros((1, up.rows), np.float32)
        self.one = one.entry(pool.state(), *self.given, x, y)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if len(x) > 1 or self.up.rows % ROWS:
            return self.add(y, self.up(self.down(x)))
        self.one(pool.state(), *self.given, x, y)
        return y


def spans(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What of b (groups, r, 16) is between the first and the last number that is not zero of each group,
    (n, 16), and int64 (groups, 3): where column 0 of a group would be in it, first column, and the one after
    the last.
    """
    used = (b != 0).any(axis=2)
    first, stop = used.argmax(axis=1), b.shape[1] - used[:, ::-1].argmax(axis=1)
    stop[~used.any(axis=1)] = 0
    ends = np.cumsum(stop - first)
    kept = [w[i:j] for w, i, j in zip(b, first, stop, strict=True)]
    return np.concatenate(kept), np.stack([ends - stop, first, stop], axis=1)


@njit(nogil=True)
def add_columns(acc, w, at, h, first, stop):
    """acc + Σ w[at + k] h[k] for `first` <= k < `stop`; w (n, 16), h f32 (n,)."""
    rest = zero()
    for k in range(first, stop - 1, 2):
        here = 16 * (at + k) + AHEAD
        simd.ask_rows(w, here, 0, here, acc)
        acc = simd.fma(acc, simd.load(w, 16 * (at + k)), simd.splat(h[k]))
        rest = simd.fma(rest, simd.load(w, 16 * (at + k + 1)), simd.splat(h[k + 1]))
    if (stop - first) % 2:
        acc = simd.fma(acc, simd.load(w, 16 * (at + stop - 1)), simd.splat(h[stop - 1]))
    return simd.add(acc, rest)


@njit(nogil=True)
def one_unit(unit, units, a, b, groups, x, parts, done, y):
    """A unit of A, or of B."""
    count, rank = parts.shape
    if unit < count:
        cols = x.shape[1]
        first, stop = share(unit, count, cols)
        for g in range(len(a) // cols):
            acc = add_columns(zero(), a, g * cols, x[0], first, stop)
            simd.store(parts, unit * rank + 16 * g, 0, acc)
        if atomic_add(done, 0, 1) == count - 1:
            for i in range(1, count):
                for k in range(rank):
                    parts[0, k] += parts[i, k]
            atomic_store(done, 0, count + 1)
        return
    while atomic_load(done, 0) <= count:
        pause()
    first, stop = share(unit - count, units - count, len(groups))
    for g in range(first, stop):
        acc = simd.load(y, 16 * g)
        acc = add_columns(acc, b, groups[g, 0], parts[0], groups[g, 1], groups[g, 2])
        simd.store(y, 16 * g, 0, acc)


@kernel()
def one(state, units, a, b, groups, parts, done, x, y):
    """y += B A x; a (groups of h times cols, 16) and b (n, 16) as `simd.kernel_view` has floats, groups of
    `spans`, parts f32 (shares of h, r in whole sixteens), done i64 (1,), x f32 (1, cols), y f32 (1, rows).
    """
    atomic_store(done, 0, 0)
    run(state, units, job(one_unit, (units, a, b, groups, x, parts, done, y)))
