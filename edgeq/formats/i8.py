"""I8: 8-bit integers, a scale for a row or for a group of columns. 8 bits per weight, and the scales.

    byte  0        int8 code - 128, that is the code with its top bit flipped
    scale, zero    arrays of their own, in Tensor.parts, as `uniform.py` describes them

    w = scale * (code - 128), or scale * (code - zero) where there are zero points

W8A8 checkpoints store their linear layers so. ggml's I8 has no scale, its integers are plain values: without
the part they unpack as a float format does, values and no grid.

Source: ggml.h, GGML_TYPE_I8; safetensors dtype I8.
"""

from typing import Any

import numpy as np

from .. import uniform
from ..grid import Grid

GGML, BLOCK, BYTES, BITS = 24, 1, 1, 8
PARTS = ("scale", "zero")


def unpack(
    blocks: np.ndarray, scale: np.ndarray | None = None, zero: np.ndarray | None = None
) -> tuple[np.ndarray, Grid | None]:
    """uint8 (n, 1), float (rows, groups), uint8 (rows, groups) -> codes uint8 (n, 1), Grid of the rows; or
    values int8 (n, 1).
    """
    if scale is None:
        return blocks.view(np.int8), None
    return blocks ^ 128, uniform.grid_of(BITS, scale, zero)


def fit(w: np.ndarray, importance: np.ndarray | None = None, **options: Any) -> Grid:
    """Grid of the rows w float32 (rows, cols); importance as w; the options are those of `uniform.fit`."""
    return uniform.fit(w, BITS, importance, **options)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 1) -> uint8 (n, 1)."""
    return codes ^ 128


def parts(grid: Grid) -> dict[str, np.ndarray]:
    """What Tensor.parts holds."""
    return uniform.parts(grid, BITS)
