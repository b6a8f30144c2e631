"""BINARY: signs, a scale for a row or for a group of columns. 1 bits per weight, and the scales.

    byte  0    bit k: 1 where code k is plus
    scale      float (rows,) or (rows, groups), an array of its own, in Tensor.parts

    w = scale * (2 * code - 1)

For signs alone the mean magnitude has the least squared error.

Source: Rastegari et al., XNOR-Net, 2016, section 3.1.
"""

import numpy as np

from ..grid import Grid

GGML, BLOCK, BYTES = None, 8, 1
PARTS = ("scale",)
LEVELS = np.array([0, 1], dtype=np.int8)


def unpack(blocks: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 1), float (rows, groups) -> codes uint8 (n, 8), Grid of the rows."""
    scale = scale.reshape(len(scale), -1)
    return np.unpackbits(blocks, axis=1, bitorder="little"), Grid(LEVELS, 2 * scale, -scale)


def fit(w: np.ndarray, importance: np.ndarray | None = None, *, group: int | None = None) -> Grid:
    """Grid of the rows w float32 (rows, cols), with a scale for a row or for so many of its columns."""
    magnitude = np.abs(w).reshape(len(w), -1, group or w.shape[1])
    weight = None if importance is None else importance.reshape(magnitude.shape)
    scale = np.average(magnitude, axis=2, weights=weight).astype(np.float32)
    return Grid(LEVELS, 2 * scale, -scale)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 8) -> uint8 (n, 1)."""
    return np.packbits(codes, axis=1, bitorder="little")


def parts(grid: Grid) -> dict[str, np.ndarray]:
    """What Tensor.parts holds."""
    return {"scale": -grid.offset}
