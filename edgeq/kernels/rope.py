"""Rotary position embedding (arXiv 2104.09864): pairs of a head's numbers turn by an angle that grows with
position.

    angle[p, i] = p * base**(-2 i / dims) / factor[i]
    (a, b) -> (a cos - b sin, a sin + b cos)

Which numbers make a pair differs: ``(2i, 2i + 1)`` in GGUF's llama files ("interleaved"), ``(i, i + dims/2)``
in Hugging Face checkpoints and all newer architectures ("halves"). Numbers past `dims` do not turn.
"""

from typing import NamedTuple

import numpy as np


class Rope(NamedTuple):
    """Angles of every position. cos, sin: float32 (positions, dims / 2)."""

    cos: np.ndarray
    sin: np.ndarray
    interleaved: bool


def rope(
    positions: int, dims: int, base: float, factors: np.ndarray | float = 1.0, *, interleaved: bool
) -> Rope:
    """Table for positions 0 .. positions - 1; `factors` (dims / 2,) divide the frequencies (linear and
    llama3 scaling).
    """
    inverse = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims) / factors
    angle = np.arange(positions, dtype=np.float64)[:, None] * inverse
    return Rope(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32), interleaved)


def llama3_factors(
    dims: int,
    base: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_context: float,
) -> np.ndarray:
    """Frequency divisors of Llama 3.1's scaling: 1 for short wavelengths, `factor` for long ones, smooth
    between.
    """
    wavelength = 2 * np.pi * base ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    smooth = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """Turn x float32 (n, heads, head_dim) by the angles of its n positions, cos and sin (n, dims / 2)."""
    half = cos.shape[1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(half), slice(half, 2 * half))
    )
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., first], x[..., second]
    out = x.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out
