"""Arithmetic on vectors of sixteen float32 in kernels, written as in NumPy: x * y + z, pick(x, y, a, b).

Nothing is fused or reordered, so that each lane computes what NumPy does with an element.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic, overload

from . import simd
from .simd import I32, LANES, Tile, _call, _constant, _elementwise, _shuffle, _tile, _vectors


@overload(operator.add)
def _plus(x, y):
    return (lambda x, y: simd.add(x, y)) if isinstance(x, Tile) else None


@overload(operator.sub)
def _minus(x, y):
    return (lambda x, y: subtract(x, y)) if isinstance(x, Tile) else None


@overload(operator.mul)
def _times(x, y):
    return (lambda x, y: simd.mul(x, y)) if isinstance(x, Tile) else None


_sub_code = _elementwise(lambda b, x, y: b.fsub(x, y))
# one instruction each on x86, where LLVM's own, which mind NaN, are three
_min_code = _elementwise(lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
_max_code = _elementwise(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
_rint_code = _elementwise(lambda b, x: _call(b, "llvm.rint.v16f32", x.type, x))
_pick_code = _elementwise(lambda b, x, y, this, that: b.select(b.fcmp_ordered("<", x, y), this, that))


@intrinsic
def subtract(typing, x, y):
    """x - y"""
    return _sub_code(x, y)


@intrinsic
def minimum(typing, x, y):
    """The smaller of x and y."""
    return _min_code(x, y)


@intrinsic
def maximum(typing, x, y):
    """The larger of x and y."""
    return _max_code(x, y)


@intrinsic
def rint(typing, x):
    """The nearest integer, the even one in the middle."""
    return _rint_code(x)


@intrinsic
def pick(typing, x, y, this, that):
    """`this` where x < y, else `that`."""
    return _pick_code(x, y, this, that)


def _half(builder, x):
    """The nearest float16 within its range: the fraction's lower bits are rounded away, or, below 2**-14, all
    bits below 2**-24.
    """
    i32 = ir.VectorType(I32, LANES)
    x = _call(builder, "llvm.minnum.v16f32", x.type, x, _constant(x.type, 65504.0))
    x = _call(builder, "llvm.maxnum.v16f32", x.type, x, _constant(x.type, -65504.0))
    bits = builder.bitcast(x, i32)
    odd = builder.and_(builder.lshr(bits, _constant(i32, 13)), _constant(i32, 1))
    bits = builder.add(builder.add(bits, _constant(i32, 0xFFF)), odd)
    normal = builder.bitcast(builder.and_(bits, _constant(i32, ~0x1FFF)), x.type)
    magnitude = _call(builder, "llvm.fabs.v16f32", x.type, x)
    coarse = _constant(x.type, 0.75)  # the last place of a sum with this is 2**-24
    small = builder.fsub(builder.fadd(magnitude, coarse), coarse)
    small = _call(builder, "llvm.copysign.v16f32", x.type, small, x)
    return builder.select(builder.fcmp_ordered("<", magnitude, _constant(x.type, 2.0**-14)), small, normal)


_half_code = _elementwise(_half)


@intrinsic
def half(typing, x):
    """The nearest float16 within its range, as float32."""
    return _half_code(x)


def _make_exchange(distance):
    """A function that gives each lane what the lane has whose number differs in that bit."""

    @intrinsic
    def exchange(typing, x):
        def code(context, builder, sig, args):
            (v,) = _vectors(builder, args[0])
            return _tile(builder, [_shuffle(builder, v, v, [i ^ distance for i in range(LANES)])])

        return x(x), code

    return exchange


exchange1, exchange2, exchange4, exchange8 = (_make_exchange(bit) for bit in (1, 2, 4, 8))


@njit(nogil=True)
def inverse(x):
    """1 / x, and 0 where that is infinite."""
    out = simd.div(simd.splat(np.float32(1)), x)
    return pick(simd.magnitude(out), simd.splat(np.float32(np.inf)), out, simd.splat(np.float32(0)))


@njit(nogil=True)
def clip(v, first, last):
    """v between two numbers."""
    return minimum(maximum(v, simd.splat(first)), simd.splat(last))


@njit(nogil=True)
def share_sum(v, lanes):
    """The sum of 1, 8 or 16 neighboring lanes, in each of them; by halves."""
    if lanes > 1:
        v = v + exchange1(v)
        v = v + exchange2(v)
        v = v + exchange4(v)
    if lanes > 8:
        v = v + exchange8(v)
    return v


@njit(nogil=True)
def share_max(v, lanes):
    """The largest of 1, 8 or 16 neighboring lanes, in each of them."""
    if lanes > 1:
        v = maximum(v, exchange1(v))
        v = maximum(v, exchange2(v))
        v = maximum(v, exchange4(v))
    if lanes > 8:
        v = maximum(v, exchange8(v))
    return v
