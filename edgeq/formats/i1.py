"""I1: integers of 1 bit, a scale for a row or for a group of columns. 1 bits per weight, and the scales.

    byte  0    bit k: code k
    scale, zero    arrays of their own, in Tensor.parts, as `uniform.py` describes them

    w = scale * (code - 1), or scale * (code - zero) where there are zero points

Without zero points all weights of a group would have one sign, so they are there wherever it matters; signs
alone are `binary`.

Source: hqq 0.2.8, core/bitpack, 1bit_u8, has such codes with zero points that are no integers.
"""

from typing import Any

import numpy as np

from .. import uniform
from ..grid import Grid

GGML, BLOCK, BYTES, BITS = None, 8, 1, 1
PARTS = ("scale", "zero")


def unpack(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 1), float (rows, groups), uint8 (rows, groups) -> codes uint8 (n, 8), Grid of the rows."""
    return np.unpackbits(blocks, axis=1, bitorder="little"), uniform.grid_of(BITS, scale, zero)


def fit(w: np.ndarray, importance: np.ndarray | None = None, **options: Any) -> Grid:
    """Grid of the rows w float32 (rows, cols); importance as w; the options are those of `uniform.fit`."""
    return uniform.fit(w, BITS, importance, **options)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 8) -> uint8 (n, 1)."""
    return np.packbits(codes, axis=1, bitorder="little")


def parts(grid: Grid) -> dict[str, np.ndarray]:
    """What Tensor.parts holds."""
    return uniform.parts(grid, BITS)
