"""a @ b of float32 matrices on the matrix unit, each number as the sum of two bfloat16, which lose 2⁻¹⁶.

For calibration and training, whose matrices change from product to product: both are packed to tiles, and
blocks that fit the cache meet. A product of a matrix with its own transpose is computed by half; where it is
to tell how inputs vary, one bfloat16 for a number does, which loses 2⁻⁸ of it at most, either way.
"""

import numpy as np
from numba import njit

from . import amx, pool, scratch, simd
from .amx import COLS, PAIR, ROWS, TILE
from .jit import kernel

SHARE = 4  # pairs of tiles of a, and of b, of a block: 128 rows and 128 columns
DEEP = 20  # tiles, split ones, that a block's products go along before the next block's: half a megabyte
WORTH = 1 << 21  # multiply-adds below which packing costs more than it brings


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a (m, k) times b (k, n), float32 (m, n).

    The same bytes for any number of threads; of each matrix rows or columns are contiguous, or it is copied.
    """
    return _product(a, b, 2)


def gram(x: np.ndarray) -> np.ndarray:
    """xᵀ x of x (n, cols) whose numbers are rounded to bfloat16, float32 (cols, cols)."""
    return _product(x.T, x, 1)


def _product(a: np.ndarray, b: np.ndarray, parts: int) -> np.ndarray:
    """a (m, k) times b (k, n), with as many bfloat16 for a number."""
    (m, inner), n = a.shape, b.shape[1]
    if m * n * inner < WORTH or min(m, n, inner) < PAIR:
        return a @ b
    (a, of_a), (b, of_b) = _flat(a), _flat(b)
    own = of_a != of_b and m == n and a.ctypes.data == b.ctypes.data
    runs, most = -(-inner // COLS), DEEP * 2 // parts
    depths = -(-runs // most)
    left, right = (_room(depths, size, -(-runs // depths), parts) for size in (m, n))
    out = scratch.empty((ROWS * left.shape[1], ROWS * right.shape[1]))
    multiply(pool.state(), a, of_a, b, of_b, np.array([m, n, inner, own]), left, right, out)
    return out[:m, :n]


def _flat(x: np.ndarray) -> tuple[np.ndarray, bool]:
    """A matrix's numbers float32, and whether they are those of its transpose."""
    if x.dtype == np.float32 and x.flags.f_contiguous and not x.flags.c_contiguous:
        return x.T.reshape(-1), True
    return np.ascontiguousarray(x, np.float32).reshape(-1), False


def _room(depths: int, size: int, deep: int, parts: int) -> np.ndarray:
    """Room for tiles of `size` rows, in pairs, as high halves and perhaps low ones: int16 (depths, tiles,
    deep, parts, 512).
    """
    tiles = depths, -(-size // PAIR) * 2, deep, parts
    return scratch.empty((*tiles, TILE // 2)).view(np.int16)


@njit(nogil=True)
def store_row(tiles, to, a, b):
    """Thirty-two neighbours in a row, the lanes of a and of b, to element `to` of tiles."""
    if tiles.shape[3] == 2:
        amx.split_row(tiles, to, to + TILE, a, b)
    else:
        amx.round_row(tiles, to, a, b)


@njit(nogil=True)
def store_pair(tiles, to, a, b):
    """Sixteen pairs, each a lane of a and one of b, to element `to` of tiles."""
    if tiles.shape[3] == 2:
        amx.split_pair(tiles, to, to + TILE, a, b)
    else:
        amx.round_pair(tiles, to, a, b)


@njit(nogil=True)
def pack(unit, x, by_rows, size, inner, of_left, tiles):
    """Write the tiles of x (size, inner) in the order of memory: those of sixteen rows, or, unless it is
    `by_rows`, when x is its transpose, those of thirty-two columns.

    of_left : as the left operand wants them; what lies in memory as the other one does is turned.
    """
    depths, across, deep, parts = tiles.shape[:4]
    pad = np.zeros(TILE, np.float32)
    for other in range(depths * deep if by_rows else across):
        tile, run = (unit, other) if by_rows else (other, unit)
        first, k = ROWS * tile, COLS * run
        here, count = min(ROWS, size - first), min(COLS, inner - k)
        to = ((run // deep * across + tile) * deep + run % deep) * parts * TILE
        source, at, stride = x, first * inner + k, inner
        if not by_rows:
            at, stride = k * size + first, size
        if here < ROWS or count < COLS:
            pad[:] = 0
            lines, numbers, width = (here, count, COLS) if by_rows else (count, here, ROWS)
            for i in range(lines):
                for j in range(numbers):
                    pad[i * width + j] = x[at + i * stride + j]
            source, at, stride = pad, 0, width
        for i in range(ROWS):
            if by_rows:
                row = at + i * stride
                store_row(tiles, to + i * COLS, simd.load(source, row), simd.load(source, row + ROWS))
            else:
                row = at + 2 * i * stride
                store_pair(tiles, to + i * COLS, simd.load(source, row), simd.load(source, row + stride))
        if by_rows != of_left:
            for part in range(parts):
                amx.turn(tiles, to + part * TILE)


@njit(nogil=True)
def units(by_rows, tiles):
    """How many units `pack` has."""
    return tiles.shape[1] if by_rows else tiles.shape[0] * tiles.shape[2]


@njit(nogil=True)
def block_unit(unit, across, left, right, own, out):
    """One block of the product; `own`: what lies below the diagonal is not wanted."""
    depths, rows, deep, parts = left.shape[:4]
    columns, width, apart = right.shape[1], out.shape[1], deep * parts * TILE
    i0, j0 = unit // across * SHARE, unit % across * SHARE
    if own and i0 > j0:
        return
    amx.configure(amx.CONFIG)
    for depth in range(depths):
        for j in range(j0, min(j0 + SHARE, columns // 2)):
            for i in range(i0, min(i0 + SHARE, j + 1 if own else rows // 2)):
                place = PAIR * (i * width + j)
                if depth:
                    amx.resume(out, place, width, ROWS)
                else:
                    amx.start()
                x, w = (depth * rows + 2 * i) * apart, (depth * columns + 2 * j) * apart
                if parts == 1:
                    amx.multiply_rounded(left, x, x + apart, right, w, w + apart, deep)
                else:
                    for k in range(0, apart, 2 * TILE):
                        amx.multiply_split(
                            left, x + k, x + k + apart, TILE, right, w + k, w + k + apart, TILE, 1
                        )
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
    pool.run(state, units(not of_a, left), pool.job(pack, (a, not of_a, m, inner, True, left)))
    pool.run(state, units(of_b, right), pool.job(pack, (b, of_b, n, inner, False, right)))
    across = (right.shape[1] // 2 + SHARE - 1) // SHARE
    down = (left.shape[1] // 2 + SHARE - 1) // SHARE
    pool.run(state, across * down, pool.job(block_unit, (across, left, right, own, out)))
    if own:
        pool.run(state, out.shape[0] // PAIR, pool.job(mirror, (out,)))
