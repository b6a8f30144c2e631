"""I4: 4-bit integers, a scale for a row or for a group of columns. 4 bits per weight, and the scales.

    byte  0    low nibble code 0, high nibble code 1
    scale, zero    arrays of their own, in Tensor.parts, as `uniform.py` describes them

    w = scale * (code - 8), or scale * (code - zero) where there are zero points

Source: compressed-tensors, pack-quantized, has such codes in words of 32 bits.
"""

from typing import Any

import numpy as np

from .. import uniform
from ..grid import Grid

GGML, BLOCK, BYTES, BITS = None, 2, 1, 4
PARTS = ("scale", "zero")
SHIFTS = np.array([0, 4], dtype=np.uint8)


def unpack(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 1), float (rows, groups), uint8 (rows, groups) -> codes uint8 (n, 2), Grid of the rows."""
    return blocks >> SHIFTS & 15, uniform.grid_of(BITS, scale, zero)


def fit(w: np.ndarray, importance: np.ndarray | None = None, **options: Any) -> Grid:
    """Grid of the rows w float32 (rows, cols); importance as w; the options are those of `uniform.fit`."""
    return uniform.fit(w, BITS, importance, **options)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 2) -> uint8 (n, 1)."""
    return np.bitwise_or.reduce(codes << SHIFTS, axis=1)[:, None]


def parts(grid: Grid) -> dict[str, np.ndarray]:
    """What Tensor.parts holds."""
    return uniform.parts(grid, BITS)
