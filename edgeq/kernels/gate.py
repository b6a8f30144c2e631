"""SwiGLU and GeGLU, compiled. Their specification is `gated` in numpy_backend.py."""

import math

import numpy as np

from . import simd
from .jit import kernel

LARGEST = np.float32(88)  # whose exponential float32 holds


@kernel("void(f4[:, ::1], f4[:, ::1])")
def silu_gate(gate_up, out):
    """out = silu(gate) * up; gate_up f32 (n, 2 size), out f32 (n, size)."""
    size = out.shape[1]
    one, minus = simd.splat(np.float32(1)), simd.splat(np.float32(-1))
    for t in range(out.shape[0]):
        for i in range(0, size - 15, 16):
            g, u = simd.load(gate_up, 2 * size * t + i), simd.load(gate_up, 2 * size * t + size + i)
            sigmoid = simd.div(one, simd.add(one, simd.exp(simd.mul(g, minus))))
            simd.store(out, size * t + i, 0, simd.mul(simd.mul(g, sigmoid), u))
        for i in range(size // 16 * 16, size):
            g = gate_up[t, i]
            out[t, i] = g / (np.float32(1) + np.float32(math.exp(min(-g, LARGEST)))) * gate_up[t, size + i]


@kernel("void(f4[:, ::1], f4[:, ::1])")
def gelu_gate(gate_up, out):
    """out = gelu(gate) * up, gelu's tanh form: g * sigmoid(2 sqrt(2/π) (g + 0.044715 g³))."""
    size = out.shape[1]
    one = simd.splat(np.float32(1))
    linear, cubic = (
        np.float32(-2 * math.sqrt(2 / math.pi)),
        np.float32(-2 * math.sqrt(2 / math.pi) * 0.044715),
    )
    a, b = simd.splat(linear), simd.splat(cubic)
    for t in range(out.shape[0]):
        for i in range(0, size - 15, 16):
            g, u = simd.load(gate_up, 2 * size * t + i), simd.load(gate_up, 2 * size * t + size + i)
            minus = simd.mul(g, simd.fma(a, b, simd.mul(g, g)))
            sigmoid = simd.div(one, simd.add(one, simd.exp(minus)))
            simd.store(out, size * t + i, 0, simd.mul(simd.mul(g, sigmoid), u))
        for i in range(size // 16 * 16, size):
            g = gate_up[t, i]
            minus = g * (linear + cubic * g * g)
            out[t, i] = g / (np.float32(1) + np.float32(math.exp(min(minus, LARGEST)))) * gate_up[t, size + i]
