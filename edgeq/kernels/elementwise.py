"""RMS norm, SwiGLU, GeGLU, sums and orders, compiled: what a row of numbers needs no other row for. Their
specification is in numpy_backend.py.
"""

import math

import numpy as np
from numba import njit

from . import simd
from .jit import kernel
from .pool import job, run

ROWS = 16  # that a thread takes at a time
LARGEST = np.float32(88)  # whose exponential float32 holds
# sums may be reordered and products fused; NaN and infinity keep their meaning
SUMS = {"reassoc", "contract"}


@njit(nogil=True)
def units(x):
    """Number of units that the rows of x are cut into."""
    return -(-x.shape[0] // ROWS)


@njit(nogil=True)
def rows(unit, x):
    """The rows of a unit."""
    return range(unit * ROWS, min(unit * ROWS + ROWS, x.shape[0]))


@njit(nogil=True, fastmath=SUMS)
def norm_unit(unit, x, weight, eps, out):
    """`rms_norm` of a unit's rows."""
    size = x.shape[1]
    for t in rows(unit, x):
        squares = np.float32(0)
        for i in range(size):
            squares += x[t, i] * x[t, i]
        factor = np.float32(1) / np.sqrt(squares / np.float32(size) + eps)
        for i in range(size):
            out[t, i] = x[t, i] * factor * weight[i]


@kernel("void(i8[::1], f4[:, ::1], f4[::1], f4, f4[:, ::1])")
def rms_norm(state, x, weight, eps, out):
    """out = x / sqrt(mean(x²) + eps) * weight, of every row; x and out f32 (n, size)."""
    run(state, units(x), job(norm_unit, (x, weight, eps, out)))


@njit(nogil=True)
def silu_unit(unit, gate_up, out):
    """`silu_gate` of a unit's rows."""
    size = out.shape[1]
    one, minus = simd.splat(np.float32(1)), simd.splat(np.float32(-1))
    for t in rows(unit, out):
        for i in range(0, size - 15, 16):
            g, u = simd.load(gate_up, 2 * size * t + i), simd.load(gate_up, 2 * size * t + size + i)
            sigmoid = simd.div(one, simd.add(one, simd.exp(simd.mul(g, minus))))
            simd.store(out, size * t + i, 0, simd.mul(simd.mul(g, sigmoid), u))
        for i in range(size // 16 * 16, size):
            g = gate_up[t, i]
            out[t, i] = g / (np.float32(1) + np.float32(math.exp(min(-g, LARGEST)))) * gate_up[t, size + i]


@kernel("void(i8[::1], f4[:, ::1], f4[:, ::1])")
def silu_gate(state, gate_up, out):
    """out = silu(gate) * up; gate_up f32 (n, 2 size), out f32 (n, size)."""
    run(state, units(out), job(silu_unit, (gate_up, out)))


@njit(nogil=True)
def gelu_unit(unit, gate_up, out):
    """`gelu_gate` of a unit's rows."""
    size = out.shape[1]
    one = simd.splat(np.float32(1))
    linear, cubic = (
        np.float32(-2 * math.sqrt(2 / math.pi)),
        np.float32(-2 * math.sqrt(2 / math.pi) * 0.044715),
    )
    a, b = simd.splat(linear), simd.splat(cubic)
    for t in rows(unit, out):
        for i in range(0, size - 15, 16):
            g, u = simd.load(gate_up, 2 * size * t + i), simd.load(gate_up, 2 * size * t + size + i)
            minus = simd.mul(g, simd.fma(a, b, simd.mul(g, g)))
            sigmoid = simd.div(one, simd.add(one, simd.exp(minus)))
            simd.store(out, size * t + i, 0, simd.mul(simd.mul(g, sigmoid), u))
        for i in range(size // 16 * 16, size):
            g = gate_up[t, i]
            minus = g * (linear + cubic * g * g)
            out[t, i] = g / (np.float32(1) + np.float32(math.exp(min(minus, LARGEST)))) * gate_up[t, size + i]


@kernel("void(i8[::1], f4[:, ::1], f4[:, ::1])")
def gelu_gate(state, gate_up, out):
    """out = gelu(gate) * up, gelu's tanh form: g * sigmoid(2 sqrt(2/π) (g + 0.044715 g³))."""
    run(state, units(out), job(gelu_unit, (gate_up, out)))


@njit(nogil=True)
def add_unit(unit, x, y, out):
    """`add` of a unit's rows."""
    for t in rows(unit, out):
        other = y[t] if y.shape[0] > 1 else y[0]
        for i in range(out.shape[1]):
            out[t, i] = x[t, i] + other[i]


@kernel("void(i8[::1], f4[:, ::1], f4[:, ::1], f4[:, ::1])")
def add(state, x, y, out):
    """out = x + y; out (n, size), x with at least as many rows and columns, y (n, size) or (1, size)."""
    run(state, units(out), job(add_unit, (x, y, out)))


@njit(nogil=True)
def gather_unit(unit, x, order, out):
    """`gather` of a unit's rows."""
    for t in rows(unit, out):
        for i in range(out.shape[1]):
            out[t, i] = x[t, order[i]]


@kernel("void(i8[::1], f4[:, ::1], i4[::1], f4[:, ::1])")
def gather(state, x, order, out):
    """out = x[:, order]; x and out f32 (n, size), order i32 (size,), all of it columns of x."""
    run(state, units(out), job(gather_unit, (x, order, out)))
