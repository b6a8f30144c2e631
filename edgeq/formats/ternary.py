"""TERNARY: -1, 0 and 1, a scale for a row or for a group of columns. 2 bits per weight, and the scales.

    byte  0    bits 2k, 2k + 1: code k, of 0, 1, 2
    scale      float (rows,) or (rows, groups), an array of its own, in Tensor.parts

    w = scale * (code - 1)

Two rules for the scale are known: the mean magnitude, of a model that was trained for it (BitNet), and the
mean magnitude of those weights that are not to become zero, of one that was not (TWN). tq1_0 and tq2_0 are
smaller ternary formats with a scale for 256 weights.

Source: Ma et al., The Era of 1-bit LLMs, 2024, equations 1 to 3.
Source: Li and Liu, Ternary Weight Networks, 2016, equations 5 and 6.
"""

import numpy as np

from ..grid import Grid, inverse

GGML, BLOCK, BYTES = None, 4, 1
PARTS = ("scale",)
LEVELS = np.array([-1, 0, 1], dtype=np.int8)
SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)
THRESHOLD = np.float32(0.7)  # of the mean magnitude


def unpack(blocks: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 1), float (rows, groups) -> codes uint8 (n, 4), Grid of the rows; code 3 stands for 2."""
    return np.minimum(blocks >> SHIFTS & 3, 2), Grid(LEVELS, scale.reshape(len(scale), -1))


def fit(w: np.ndarray, importance: np.ndarray | None = None, *, group: int | None = None) -> Grid:
    """BitNet's grid of the rows w float32 (rows, cols), with a scale for a row or for so many of its columns.

    The nearest codes on it are BitNet's round(w / scale) between -1 and 1.
    """
    magnitude = np.abs(w).reshape(len(w), -1, group or w.shape[1])
    weight = None if importance is None else importance.reshape(magnitude.shape)
    return Grid(LEVELS, np.average(magnitude, axis=2, weights=weight).astype(np.float32))


def threshold(w: np.ndarray, *, group: int | None = None) -> tuple[np.ndarray, Grid]:
    """TWN's codes (rows, cols) and grid: zero is what lies within 0.7 times the mean magnitude."""
    x = w.reshape(len(w), -1, group or w.shape[1])
    magnitude = np.abs(x)
    large = magnitude > THRESHOLD * magnitude.mean(axis=2, keepdims=True)
    scale = (magnitude * large).sum(axis=2) * inverse(large.sum(axis=2))
    return (1 + np.sign(x) * large).astype(np.uint8).reshape(w.shape), Grid(LEVELS, scale)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 4) below 3 -> uint8 (n, 1)."""
    return np.bitwise_or.reduce(codes << SHIFTS, axis=1)[:, None]


def parts(grid: Grid) -> dict[str, np.ndarray]:
    """What Tensor.parts holds."""
    return {"scale": grid.scale}
