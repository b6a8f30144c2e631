"""`ranges.mse` compiled, bit for bit: sixteen ranges side by side, one in a lane, each with all its shrinks
while its values are in the nearest cache.
"""

import numpy as np
from numba import njit

from .. import ranges
from . import simd
from .jit import kernel
from .lanewise import clip, inverse, maximum, minimum, pick, rint
from .simd import LANES

INFINITY = np.float32(np.inf)


def mse(w: np.ndarray, bits: int, symmetric: bool, importance: np.ndarray | None = None) -> ranges.Range:
    """`ranges.mse` with its own shrinks."""
    low, high = ranges.minmax(w, bits, symmetric)
    if importance is None:
        importance = np.ones((1, w.shape[1]), np.float32)
    best = np.empty((len(w), 1), np.float32)
    first, last, steps = ranges.levels(bits, symmetric)
    shrink(
        np.ascontiguousarray(w, np.float32), np.ascontiguousarray(importance, np.float32),
        np.concatenate([low, high], axis=1), np.array([first, last, steps], np.float32), symmetric,
        ranges.SHRINKS, np.empty((2 * w.shape[1] + 2) * LANES, np.float32), best,
    )  # fmt: skip
    return low * best, high * best


@njit(nogil=True)
def on_grid(low, high, steps, symmetric):
    """`ranges.grid_parameters`"""
    zero = simd.splat(np.float32(0))
    if symmetric:
        return simd.div(maximum(zero - low, high), simd.splat(steps)), zero
    low, high = minimum(low, zero), maximum(high, zero)
    scale = simd.div(high - low, simd.splat(steps))
    return scale, rint((zero - low) * inverse(scale))


@kernel("void(f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], b1, f4[::1], f4[::1], f4[:, ::1])")
def shrink(x, importance, ends, numbers, symmetric, shrinks, scratch, best):
    """best f32 (n, 1) = the shrink of each range with the least squared error of its values x f32 (n, size).

    importance f32 (n or 1, size); ends f32 (n, 2); numbers f32 (3,): first and last level, and steps from the
    least value to the largest; scratch f32 ((2 size + 2) * 16,).
    """
    count, size = x.shape
    last = len(importance) - 1
    for tile in range(0, count, LANES):
        for lane in range(LANES):
            g = min(tile + lane, count - 1)  # the last tile may have lanes to spare
            for j in range(size):
                scratch[2 * j * LANES + lane] = x[g, j]
                scratch[(2 * j + 1) * LANES + lane] = importance[min(g, last), j]
            scratch[2 * size * LANES + lane] = ends[g, 0]
            scratch[(2 * size + 1) * LANES + lane] = ends[g, 1]
        low, high = simd.load(scratch, 2 * size * LANES), simd.load(scratch, (2 * size + 1) * LANES)
        least, chosen = simd.splat(INFINITY), simd.splat(shrinks[0])
        for i in range(len(shrinks)):
            s = simd.splat(shrinks[i])
            scale, zero = on_grid(low * s, high * s, numbers[2], symmetric)
            over, lost = inverse(scale), simd.splat(np.float32(0))
            for j in range(0, 2 * size * LANES, 2 * LANES):
                v = simd.load(scratch, j)
                d = v - (clip(rint(v * over + zero), numbers[0], numbers[1]) - zero) * scale
                lost = lost + simd.load(scratch, j + LANES) * (d * d)
            least, chosen = minimum(lost, least), pick(lost, least, s, chosen)
        simd.store(scratch, 0, 0, chosen)
        for lane in range(min(LANES, count - tile)):
            best[tile + lane, 0] = scratch[lane]
