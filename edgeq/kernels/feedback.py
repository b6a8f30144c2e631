"""Columns that are rounded one after the other, compiled: the inner loops of `quantizers/gptq.py` and
`quantizers/descent.py`, bit for bit.

Arrays are (columns, rows), with a row's scale and offset in the lane of its weights. `levels` is what `table`
gives, and `nearest` the code of `grid.nearest`.
"""

import numpy as np
from numba import njit

from .jit import kernel
from .search import table

__all__ = ["descend", "round_block", "table"]

ROWS = 64  # that are taken together: a block's columns of them stay in the cache


@njit(nogil=True)
def nearest(v, levels):
    """Code of the level nearest to v."""
    if levels.shape[1] == 2:
        return np.uint8(min(max(np.rint(v), levels[0, 0]), levels[0, 1]) - levels[0, 0])
    code = 0
    for i in range(levels.shape[1] - 1):
        code += v > levels[1, i]
    return np.uint8(code)


@njit(nogil=True)
def level(code, levels):
    """The level of a code."""
    return levels[0, 0] + np.float32(code) if levels.shape[1] == 2 else levels[0, code]


@kernel(
    "void(f8[:, ::1], f8[:, ::1], i8[::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f8[::1],"
    " u1[:, ::1], f8[:, ::1])",
    error_model="numpy",
)
def round_block(left, feedback, groups, scale, over, offset, levels, step, codes, errors):
    """`gptq.round_block`: of left f64 (n, rows), with feedback f64 (n, n), codes u8 and errors f64 (n, rows).

    groups i64 (n,) tells each column's row of scale, over and offset f32 (groups, rows); step f64 (1,).
    """
    n, rows = left.shape
    for first in range(0, rows, ROWS):
        last = min(first + ROWS, rows)
        for j in range(n):
            g = groups[j]
            for r in range(first, last):
                code = nearest((np.float32(left[j, r]) - offset[g, r]) * over[g, r], levels)
                value = level(code, levels) * scale[g, r] + offset[g, r]
                codes[j, r] = code
                errors[j, r] = np.rint((left[j, r] - np.float64(value)) / step[0]) * step[0]
            for k in range(j + 1, n):
                f = feedback[j, k]
                for r in range(first, last):
                    left[k, r] -= f * errors[j, r]


@kernel(
    "void(f4[:, ::1], f4[:, ::1], f4[::1], f4[::1], f4[::1], f4[:, ::1], u1[:, ::1], f4[:, ::1])",
    error_model="numpy",
)
def descend(slope, h, scale, over, offset, levels, codes, moves):
    """`descent.round_group`: slope f32 (n, rows), codes u8 (n, rows) and moves f32 (n, rows) change; h f32
    (n, n), scale, over and offset f32 (rows,).
    """
    n, rows = slope.shape
    for first in range(0, rows, ROWS):
        last = min(first + ROWS, rows)
        for j in range(n):
            down = np.float32(1) / h[j, j]
            for r in range(first, last):
                value = level(codes[j, r], levels) * scale[r] + offset[r]
                code = nearest((value - slope[j, r] * down - offset[r]) * over[r], levels)
                codes[j, r] = code
                moves[j, r] = level(code, levels) * scale[r] + offset[r] - value
            for k in range(n):
                f = h[j, k]
                for r in range(first, last):
                    slope[k, r] += f * moves[j, r]
