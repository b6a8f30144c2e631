"""a @ b of float32 matrices on the matrix unit, each number as the sum of two bfloat16, which lose 2⁻¹⁶.

For calibration and training, whose matrices change from product to product: both are packed to tiles, and
blocks that fit the cache meet. A product of a matrix with its own transpose is computed by half.
"""

import numpy as np
from numba import njit

from . import amx, pool, scratch, simd
from .amx import COLS, PAIR, ROWS, TILE
from .jit import kernel

SHARE = 4  # pairs of tiles of a, and of b, of a block: 128 rows and 128 columns
DEEP = 20  # tiles that a block's products go along, at most, before the next block's: half a megabyte
WORTH = 1 << 21  # multiply-adds below which packing costs more than it brings


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (m, k) times b (k, n), float32 (m, n).

    The same bytes for any number of threads; of each matrix rows or columns are contiguous, or it is copied.
    """
    (m, inner), n = a.shape, b.shape[1]
    if m * n * inner < WORTH or min(m, n, inner) < PAIR:
        return a @ b
    (a, of_a), (b, of_b) = _flat(a), _flat(b)
    own = of_a != of_b and m == n and a.ctypes.data == b.ctypes.data
    runs = -(-inner // COLS)
    depths = -(-runs // DEEP)
    left, right = (_room(depths, size, -(-runs // depths)) for size in (m, n))
    out = scratch.empty((ROWS * left.shape[1], ROWS * right.shape[1]))
    multiply(pool.state(), a, of_a, b, of_b, np.array([m, n, inner, own]), left, right, out)
    return out[:m, :n]


def _flat(x: np.ndarray) -> tuple[np.ndarray, bool]:
    """A matrix's numbers float32, and whether they are those of its transpose."""
    if x.dtype == np.float32 and x.flags.f_contiguous and not x.flags.c_contiguous:
        return x.T.reshape(-1), True
    return np.ascontiguousarray(x, np.float32).reshape(-1), False


def _room(depths: int, size: int, deep: int) -> np.ndarray:
    """Room for tiles of `size` rows, in pairs, as high halves and low ones: int16 (depths, tiles, deep, 2,
    512).
    """
    return scratch.empty((depths, -(-size // PAIR) * 2, deep, 2, TILE // 2)).view(np.int16)


@njit(nogil=True)
def fetch(x, transposed, rows, inner, row, k, block):
    """Write sixteen rows of x (rows, inner), or its transpose, from k on, to block f32 (16, 32)."""
    here, count = min(ROWS, rows - row), min(COLS, inner - k)
    if here < ROWS or count < COLS:
        block[:] = 0
    if transposed:
        for j in range(count):
            for i in range(here):
                block[i, j] = x[(k + j) * rows + row + i]
    else:
        for i in range(here):
            for j in range(count):
                block[i, j] = x[(row + i) * inner + k + j]


@njit(nogil=True)
def pack_left(unit, a, transposed, m, inner, left):
    """Split sixteen rows of a, (m, inner) or its transpose."""
    depths, tiles, deep = left.shape[:3]
    block = np.empty((ROWS, COLS), np.float32)
    for run in range(depths * deep):
        fetch(a, transposed, m, inner, ROWS * unit, COLS * run, block)
        to = ((run // deep * tiles + unit) * deep + run % deep) * 2 * TILE
        for i in range(0, TILE, COLS):
            amx.split_row(left, to + i, to + i + TILE, simd.load(block, i), simd.load(block, i + ROWS))


@njit(nogil=True)
def pack_right(unit, b, transposed, n, inner, right):
    """Split sixteen columns of b, (inner, n) or its transpose."""
    depths, tiles, deep = right.shape[:3]
    block, turned = np.empty((ROWS, COLS), np.float32), np.empty((COLS, ROWS), np.float32)
    for run in range(depths * deep):
        to = ((run // deep * tiles + unit) * deep + run % deep) * 2 * TILE
        fetch(b, not transposed, n, inner, ROWS * unit, COLS * run, block)
        for i in range(ROWS):
            for j in range(COLS):
                turned[j, i] = block[i, j]
        for i in range(0, TILE, COLS):
            amx.split_pair(right, to + i, to + i + TILE, simd.load(turned, i), simd.load(turned, i + ROWS))


@njit(nogil=True)
def block_unit(unit, across, left, right, own, out):
    """One block of the product; `own`: what lies below the diagonal's blocks is not wanted."""
    depths, rows, deep = left.shape[:3]
    columns, width, apart = right.shape[1], out.shape[1], deep * 2 * TILE
    i0, j0 = unit // across * SHARE, unit % across * SHARE
    if own and i0 > j0:
        return
    amx.configure(amx.CONFIG)
    for depth in range(depths):
        for j in range(j0, min(j0 + SHARE, columns // 2)):
            for i in range(i0, min(i0 + SHARE, rows // 2)):
                place = PAIR * (i * width + j)
                if depth:
                    amx.resume(out, place, width, ROWS)
                else:
                    amx.start()
                x, w = (depth * rows + 2 * i) * apart, (depth * columns + 2 * j) * apart
                for k in range(0, apart, 2 * TILE):
                    amx.multiply_split(left, x + k, x + k + apart, TILE, right, w + k, w + k + apart, TILE, 1)
                amx.finish(out, place, width, ROWS)
    amx.release()


@njit(nogil=True)
def mirror(unit, out):
    """Copy what lies above the diagonal to below it, of thirty-two rows."""
    for first in range(0, PAIR * unit + PAIR, PAIR):
        for i in range(PAIR * unit, PAIR * unit + PAIR):
            for j in range(first, min(i, first + PAIR)):
                out[i, j] = out[j, i]


@kernel(
    "void(i8[::1], f4[::1], b1, f4[::1], b1, i8[::1], i2[:, :, :, :, ::1], i2[:, :, :, :, ::1], f4[:, ::1])"
)
def multiply(state, a, of_a, b, of_b, sizes, left, right, out):
    """out[:m, :n] = a b; sizes: m, n, k, and whether b is aᵀ; left, right: `_room` for both."""
    m, n, inner, own = sizes
    pool.run(state, left.shape[1], pool.job(pack_left, (a, of_a, m, inner, left)))
    pool.run(state, right.shape[1], pool.job(pack_right, (b, of_b, n, inner, right)))
    across = (right.shape[1] // 2 + SHARE - 1) // SHARE
    down = (left.shape[1] // 2 + SHARE - 1) // SHARE
    pool.run(state, across * down, pool.job(block_unit, (across, left, right, own, out)))
    if own:
        pool.run(state, out.shape[0] // PAIR, pool.job(mirror, (out,)))
