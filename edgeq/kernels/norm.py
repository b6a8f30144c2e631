"""RMS norm, compiled. Its specification is `rms_norm` in numpy_backend.py."""

import numpy as np

from .jit import kernel

# sums may be reordered and products fused; NaN and infinity keep their meaning
SUMS = {"reassoc", "contract"}


@kernel("void(f4[:, ::1], f4[::1], f4, f4[:, ::1])", fastmath=SUMS)
def rms_norm(x, weight, eps, out):
    """out = x / sqrt(mean(x²) + eps) * weight, of every row; x and out f32 (n, size)."""
    size = x.shape[1]
    for t in range(x.shape[0]):
        squares = np.float32(0)
        for i in range(size):
            squares += x[t, i] * x[t, i]
        factor = np.float32(1) / np.sqrt(squares / np.float32(size) + eps)
        for i in range(size):
            out[t, i] = x[t, i] * factor * weight[i]
