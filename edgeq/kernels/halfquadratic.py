"""The rounds of `quantizers/hqq.py` compiled, bit for bit: sixteen groups side by side, one in a lane, which
go through all rounds while they are in the nearest cache.
"""

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic

from ..powers import EXP2, FARTHEST, LEAST, LOG2
from . import simd
from .jit import kernel
from .lanewise import clip, half, inverse, maximum, minimum, pick, rint, share_max, share_sum
from .simd import I32, LANES, _call, _constant, _elementwise

FREE, HALF, STEPS, ZERO = range(4)
STORES = {"free": FREE, "half": HALF, "steps": STEPS, "zero": ZERO}
NOUGHT, INFINITY, TINY = np.float32(0), np.float32(np.inf), np.finfo(np.float32).tiny


def solve(
    x: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    ends: tuple[int, int],
    store: tuple[str, int, int],
    p: float,
    betas: np.ndarray,
) -> np.ndarray:
    """`hqq.solve`; store: a kind of `hqq.Store`, groups of a block, and the last step of a unit."""
    kind, groups, steps = store
    x, scale, offset = (np.ascontiguousarray(v, np.float32) for v in (x, scale, offset))
    kept, scratch = np.empty_like(offset), np.empty((x.shape[1] + 2) * LANES, np.float32)
    rounds(
        x, scale, offset, STORES[kind], groups, np.array([*ends, steps, p], np.float32), betas, scratch, kept
    )
    return kept


def _horner(builder, coefficients, x):
    """`powers.horner`"""
    out = _constant(x.type, coefficients[-1])
    for c in coefficients[-2::-1]:
        out = builder.fadd(builder.fmul(out, x), _constant(x.type, c))
    return out


def _power(builder, x, p):
    """`powers.power`"""
    i32 = ir.VectorType(I32, LANES)
    place = _constant(i32, 23)
    bits = builder.bitcast(x, i32)
    e = builder.ashr(builder.sub(bits, _constant(i32, LEAST)), place)
    f = builder.bitcast(builder.sub(bits, builder.shl(e, place)), x.type)
    f = builder.fsub(f, _constant(x.type, 1.0))
    y = builder.fmul(builder.fmul(_horner(builder, LOG2, f), f), p)
    y = builder.fadd(builder.fmul(builder.sitofp(e, x.type), p), y)
    y = _call(builder, "llvm.maxnum.v16f32", x.type, y, _constant(x.type, -FARTHEST))
    y = _call(builder, "llvm.minnum.v16f32", x.type, y, _constant(x.type, FARTHEST))
    k = _call(builder, "llvm.rint.v16f32", x.type, y)
    z = builder.bitcast(_horner(builder, EXP2, builder.fsub(y, k)), i32)
    return builder.bitcast(builder.add(z, builder.shl(builder.fptosi(k, i32), place)), x.type)


_power_code = _elementwise(_power)


@intrinsic
def power(typing, x, p):
    """`powers.power`"""
    return _power_code(x, p)


@njit(nogil=True)
def stored(offset, scale, kind, groups, numbers):
    """`hqq.stored`"""
    zero = simd.splat(NOUGHT)
    if kind == HALF:
        return half(offset)
    if kind == STEPS:
        last = numbers[2]
        negative = zero - offset
        unit = half(simd.div(share_max(maximum(negative, zero), groups), simd.splat(last)))
        return zero - unit * clip(rint(negative * inverse(unit)), NOUGHT, last)
    if kind == ZERO:
        shift = zero - simd.splat(numbers[0])
        return scale * (shift - half(shift - simd.div(offset, scale)))
    return offset


@kernel("void(f4[:, ::1], f4[::1], f4[::1], i8, i8, f4[::1], f4[::1], f4[::1], f4[::1])", error_model="numpy")
def rounds(x, scale, offset, kind, groups, numbers, betas, scratch, kept):
    """kept f32 (n,) = the best offsets of groups x f32 (n, group); scale, offset f32 (n,) to begin with.

    numbers f32 (4,): first and last level, last step of a unit, p; scratch f32 ((group + 2) * 16,).
    """
    count, group = x.shape
    zero, tiny, p = simd.splat(NOUGHT), simd.splat(TINY), simd.splat(numbers[3])
    for tile in range(0, count, LANES):
        for lane in range(LANES):
            g = min(tile + lane, count - 1)  # the last tile may have lanes to spare
            for j in range(group):
                scratch[j * LANES + lane] = x[g, j]
            scratch[group * LANES + lane] = scale[g]
            scratch[(group + 1) * LANES + lane] = offset[g]
        s, o = simd.load(scratch, group * LANES), simd.load(scratch, (group + 1) * LANES)
        over, best, keep = inverse(s), simd.splat(INFINITY), o
        for i in range(len(betas)):
            beta, now = simd.splat(betas[i]), stored(o, s, kind, groups, numbers)
            lost, moved = zero, zero
            for j in range(0, group * LANES, LANES):
                v = simd.load(scratch, j)
                q = clip(rint((v - now) * over), numbers[0], numbers[1]) * s
                left = v - (q + now)
                size = simd.magnitude(left)
                many = power(size, p)
                limit = simd.div(many, maximum(size, tiny) * beta)
                noise = left - maximum(minimum(left, limit), zero - limit)
                lost, moved = lost + many, moved + ((v - noise) - q)
            lost = share_sum(lost, groups)
            keep, best = pick(lost, best, now, keep), minimum(lost, best)
            o = simd.div(moved, simd.splat(np.float32(group)))
        simd.store(scratch, 0, 0, keep)
        for lane in range(min(LANES, count - tile)):
            kept[tile + lane] = scratch[lane]
