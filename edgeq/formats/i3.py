"""I3: 3-bit integers, a scale for a row or for a group of columns. 3 bits per weight, and the scales.

    byte  0..2    bits 3k … 3k + 2 of the 24 (little-endian): code k
    scale, zero    arrays of their own, in Tensor.parts, as `uniform.py` describes them

    w = scale * (code - 4), or scale * (code - zero) where there are zero points

Source: compressed-tensors, pack-quantized, has such codes in words of 32 bits.
"""

from typing import Any

import numpy as np

from .. import uniform
from ..grid import Grid

GGML, BLOCK, BYTES, BITS = None, 8, 3, 3
PARTS = ("scale", "zero")


def unpack(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 3), float (rows, groups), uint8 (rows, groups) -> codes uint8 (n, 8), Grid of the rows."""
    bits = np.unpackbits(blocks, axis=1, bitorder="little").reshape(-1, BLOCK, BITS)
    codes = np.packbits(bits, axis=2, bitorder="little").reshape(-1, BLOCK)
    return codes, uniform.grid_of(BITS, scale, zero)


def fit(w: np.ndarray, importance: np.ndarray | None = None, **options: Any) -> Grid:
    """Grid of the rows w float32 (rows, cols); importance as w; the options are those of `uniform.fit`."""
    return uniform.fit(w, BITS, importance, **options)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 8) -> uint8 (n, 3)."""
    bits = np.unpackbits(codes[:, :, None], axis=2, count=BITS, bitorder="little")
    return np.packbits(bits.reshape(len(codes), -1), axis=1, bitorder="little")


def parts(grid: Grid) -> dict[str, np.ndarray]:
    """What Tensor.parts holds."""
    return uniform.parts(grid, BITS)
