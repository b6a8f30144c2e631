"""I2: 2-bit integers, a scale for a row or for a group of columns. 2 bits per weight, and the scales.

    byte  0    bits 2k, 2k + 1: code k
    scale, zero    arrays of their own, in Tensor.parts, as `uniform.py` describes them

    w = scale * (code - 2), or scale * (code - zero) where there are zero points

Source: compressed-tensors, pack-quantized, has such codes in words of 32 bits.
"""

from typing import Any

import numpy as np

from .. import uniform
from ..grid import Grid

GGML, BLOCK, BYTES, BITS = None, 4, 1, 2
PARTS = ("scale", "zero")
SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)


def unpack(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 1), float (rows, groups), uint8 (rows, groups) -> codes uint8 (n, 4), Grid of the rows."""
    return blocks >> SHIFTS & 3, uniform.grid_of(BITS, scale, zero)


def fit(w: np.ndarray, importance: np.ndarray | None = None, **options: Any) -> Grid:
    """Grid of the rows w float32 (rows, cols); importance as w; the options are those of `uniform.fit`."""
    return uniform.fit(w, BITS, importance, **options)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 4) -> uint8 (n, 1)."""
    return np.bitwise_or.reduce(codes << SHIFTS, axis=1)[:, None]


def parts(grid: Grid) -> dict[str, np.ndarray]:
    """What Tensor.parts holds."""
    return uniform.parts(grid, BITS)
