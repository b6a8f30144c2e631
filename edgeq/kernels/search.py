"""`edgeq/search.py` compiled, bit for bit: sixteen groups side by side, one in a lane.

What is a NumPy array (groups,) there is a vector here, and the functions are called the same. A group's
weights follow each other at a distance of sixteen: x, weight f32 (group * 16,). `levels` is what `table`
gives.
"""

import numpy as np
from numba import njit

from .. import search
from ..grid import Grid
from ..search import Space
from . import simd
from .jit import kernel
from .lanewise import clip, half, inverse, maximum, minimum, pick, rint, share_max, share_sum
from .simd import LANES

MOVES = np.array(search.MOVES, np.float32)
SINGULAR, GROWTH = search.SINGULAR, search.GROWTH
NOUGHT, INFINITY = np.float32(0), np.float32(np.inf)


def fit(w: np.ndarray, importance: np.ndarray | None, space: Space, block: int) -> Grid:
    """Grid of all blocks of the rows w float32 (rows, cols), with importance (cols,)."""
    grow = importance is None
    if importance is None:
        importance = np.ones(w.shape[1], np.float32)
    out = np.empty((4, w.size // space.group), np.float32)
    groups = block // space.group
    fit_groups(
        w.reshape(-1), np.ascontiguousarray(importance, np.float32), groups, space.offset,
        np.array(space.steps or (), np.float32), search.factors(space), search.PASSES, search.shares(space),
        search.ROUNDS, grow, table(space.levels), np.empty((2, space.group * LANES), np.float32), out,
    )  # fmt: skip
    return search.grid_of(out.reshape(4, -1, groups), space)


def table(levels: np.ndarray) -> np.ndarray:
    """float32 (3, n): levels, middles between each and the next, and their distances; or float32 (3, 2) of
    the first and last, if they are neighboring integers. Middles below zero count to the level above.
    """
    q = levels.astype(np.float32)
    gaps = np.diff(q)
    middles = (q[1:] + q[:-1]) / 2
    middles = np.where(middles < 0, np.nextafter(middles, -INFINITY), middles)
    if (gaps == 1).all():
        return np.stack([q[[0, -1]]] * 3)
    return np.stack([q, np.append(middles, INFINITY), np.append(gaps, NOUGHT)])


@njit(nogil=True)
def nearest(v, levels):
    """The level nearest to v."""
    if levels.shape[1] == 2:
        return clip(rint(v), levels[0, 0], levels[0, 1])
    q, zero = simd.splat(levels[0, 0]), simd.splat(NOUGHT)
    for i in range(levels.shape[1] - 1):
        q = q + pick(simd.splat(levels[1, i]), v, simd.splat(levels[2, i]), zero)
    return q


@njit(nogil=True)
def measure(x, weight, scale, offset, center, levels):
    """`search.measure`"""
    over = inverse(scale)
    zero = simd.splat(NOUGHT)
    error, r1, rq1, q1, qq1 = zero, zero, zero, zero, zero
    for j in range(0, len(x), LANES):
        v, w = simd.load(x, j), simd.load(weight, j)
        q = nearest((v - offset) * over, levels)
        r = v - (q * scale + offset)
        q = q - center
        wr, wq = w * r, w * q
        error, r1, rq1, q1, qq1 = error + wr * r, r1 + wr, rq1 + wr * q, q1 + wq, qq1 + wq * q
    return error, r1, rq1, q1, qq1


@njit(nogil=True)
def error_of(x, weight, scale, offset, levels):
    """The error alone."""
    over = inverse(scale)
    error = simd.splat(NOUGHT)
    for j in range(0, len(x), LANES):
        v, w = simd.load(x, j), simd.load(weight, j)
        r = v - (nearest((v - offset) * over, levels) * scale + offset)
        error = error + w * r * r
    return error


@njit(nogil=True)
def total(terms):
    """`search.total`"""
    out = simd.load(terms, 0)
    for j in range(LANES, len(terms), LANES):
        out = out + simd.load(terms, j)
    return out


@njit(nogil=True)
def total_product(x, weight):
    """`search.total` of weight * x"""
    out = simd.load(weight, 0) * simd.load(x, 0)
    for j in range(LANES, len(x), LANES):
        out = out + simd.load(weight, j) * simd.load(x, j)
    return out


@njit(nogil=True)
def alone(x, weight, w, has_offset, has_steps, factors, passes, levels):
    """`search.alone`"""
    zero = simd.splat(NOUGHT)
    low = simd.load(x, 0)
    high = low
    for j in range(LANES, len(x), LANES):
        v = simd.load(x, j)
        low, high = minimum(low, v), maximum(high, v)
    if has_offset:
        low = minimum(low, zero) if has_steps else low
        span, begin = high - low, low
    else:
        span, begin = pick(high, zero - low, low, high), zero
    mean, center = total_product(x, weight) * inverse(w), zero
    best, best_scale, best_offset = simd.splat(INFINITY), begin, begin
    for i in range(len(factors)):
        scale, offset = span * simd.splat(factors[i]), begin
        for _ in range(passes):
            if has_offset:
                center = nearest((mean - offset) * inverse(scale), levels)
            sums = measure(x, weight, scale, offset, center, levels)
            best_scale = pick(sums[0], best, scale, best_scale)
            best_offset = pick(sums[0], best, offset, best_offset)
            best = minimum(sums[0], best)
            scale, offset = lowest(scale, offset, w, center, sums, has_offset, has_steps)
    return best_scale, best_offset


@njit(nogil=True)
def lowest(scale, offset, w, center, sums, has_offset, has_steps):
    """`search.lowest`"""
    _, r, rq, q, qq = sums
    if not has_offset:
        return scale + rq * inverse(qq), offset
    zero = simd.splat(NOUGHT)
    determinant = w * qq - q * q
    over = pick(simd.splat(SINGULAR) * (w * qq), determinant, inverse(determinant), zero)
    more = (w * rq - q * r) * over
    new_scale = scale + more
    new_offset = offset + ((qq * r - q * rq) * over - more * center)
    if has_steps:
        q0 = q + center * w
        qq0 = qq + center * (q + q0)
        at_zero = scale + (rq + center * r + offset * q0) * inverse(qq0)
        new_scale = pick(zero, new_offset, at_zero, new_scale)
        new_offset = pick(zero, new_offset, zero, new_offset)
    return pick(zero, new_scale, new_scale, scale), pick(zero, new_scale, new_offset, offset)


@njit(nogil=True)
def together(x, weight, w, scale, offset, groups, has_offset, steps, shares, rounds, levels):
    """`search.together`"""
    zero = simd.splat(NOUGHT)
    first, last = steps[0], steps[1]
    largest = share_max(simd.magnitude(scale), groups)
    largest_offset = share_max(zero - offset, groups)
    best = simd.splat(INFINITY)
    best_unit, best_offset_unit, best_s, best_m = zero, zero, zero, zero
    for i in range(len(shares)):
        unit = half(largest * simd.splat(shares[i]))
        offset_unit = half(largest_offset * simd.splat(shares[i]))
        s = clip(rint(scale * inverse(unit)), first, last)
        m = clip(rint((zero - offset) * inverse(offset_unit)), NOUGHT, last)
        for _ in range(rounds):
            error, s, m = move(x, weight, unit, offset_unit, s, m, has_offset, steps, levels)
            error = share_sum(error, groups)
            best_unit = pick(error, best, unit, best_unit)
            best_offset_unit = pick(error, best, offset_unit, best_offset_unit)
            best_s, best_m = pick(error, best, s, best_s), pick(error, best, m, best_m)
            best = minimum(error, best)
            sums = measure(x, weight, unit * s, zero - offset_unit * m, zero, levels)
            unit, offset_unit = lowest_units(unit, offset_unit, s, m, w, sums, has_offset, groups)
    return best_unit, best_offset_unit, best_s, best_m


@njit(nogil=True)
def grown(x, unit, offset_unit, s, m, groups, levels):
    """`search.grown`"""
    scale = unit * s
    offset, over = simd.splat(NOUGHT) - offset_unit * m, inverse(scale)
    size, lost = simd.splat(NOUGHT), simd.splat(NOUGHT)
    for j in range(0, len(x), LANES):
        v = simd.load(x, j)
        r = v - (nearest((v - offset) * over, levels) * scale + offset)
        size, lost = size + v * v, lost + v * r
    size = share_sum(size, groups)
    left = size - share_sum(lost, groups)
    growth = clip(size * inverse(left), np.float32(1), GROWTH)
    return half(unit * growth), half(offset_unit * growth)


@njit(nogil=True)
def move(x, weight, unit, offset_unit, s, m, has_offset, steps, levels):
    """`search.move`"""
    zero = simd.splat(NOUGHT)
    best, best_s, best_m = simd.splat(INFINITY), s, m
    for i in range(len(MOVES)):
        new_s = clip(s + simd.splat(MOVES[i]), steps[0], steps[1])
        for k in range(len(MOVES) if has_offset else 1):
            new_m = clip(m + simd.splat(MOVES[k]), NOUGHT, steps[1])
            error = error_of(x, weight, unit * new_s, zero - offset_unit * new_m, levels)
            best_s, best_m = pick(error, best, new_s, best_s), pick(error, best, new_m, best_m)
            best = minimum(error, best)
    return best, best_s, best_m


@njit(nogil=True)
def lowest_units(unit, offset_unit, s, m, w, sums, has_offset, groups):
    """`search.lowest_units`"""
    _, r, rq, q, qq = sums
    ss, sr = share_sum(s * s * qq, groups), share_sum(s * rq, groups)
    if not has_offset:
        return half(unit + sr * inverse(ss)), offset_unit
    sm, mm = share_sum(s * m * q, groups), share_sum(m * m * w, groups)
    mr = share_sum(m * r, groups)
    determinant = ss * mm - sm * sm
    over = pick(simd.splat(SINGULAR) * (ss * mm), determinant, inverse(determinant), simd.splat(NOUGHT))
    return half(unit + (mm * sr - sm * mr) * over), half(offset_unit + (sm * sr - ss * mr) * over)


@kernel(
    "void(f4[::1], f4[::1], i8, b1, f4[::1], f4[::1], i8, f4[::1], i8, b1, f4[:, ::1], f4[:, ::1],"
    "f4[:, ::1])",
    error_model="numpy",
)
def fit_groups(
    w, importance, groups, has_offset, steps, factors, passes, shares, rounds, grow, levels, scratch, out
):
    """out f32 (4, all groups) = scale, offset, or the units of a block of so many groups, and their steps.

    w f32 (all groups * group,); importance f32 (cols,); steps f32 (2,) or (0,); scratch f32 (2, group * 16).
    """
    x, weight = scratch[0], scratch[1]
    group, count, has_steps = len(x) // LANES, out.shape[1], len(steps) > 0
    in_row = len(importance) // group
    for tile in range(0, count, LANES):
        for lane in range(LANES):
            g = min(tile + lane, count - 1)  # the last tile may have lanes to spare
            column = g % in_row * group
            for j in range(group):
                x[j * LANES + lane] = w[g * group + j]
                weight[j * LANES + lane] = importance[column + j]
        scale, offset = alone(x, weight, total(weight), has_offset, has_steps, factors, passes, levels)
        if has_steps:
            a, b, s, m = together(
                x, weight, total(weight), scale, offset, groups, has_offset, steps, shares, rounds, levels
            )
            if grow:
                a, b = grown(x, a, b, s, m, groups, levels)
        else:
            a, b, s, m = half(scale), half(offset), scale, offset
        simd.store(x, 0, 0, a)
        simd.store(x, LANES, 0, b)
        simd.store(x, 2 * LANES, 0, s)
        simd.store(x, 3 * LANES, 0, m)
        for lane in range(min(LANES, count - tile)):
            for i in range(4):
                out[i, tile + lane] = x[i * LANES + lane]
