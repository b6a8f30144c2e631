"""Rounding: the simple encodings, byte for byte those of ggml and gguf-py.

The scale follows from the extreme weights of a block. Codes are rounded by the scale as computed, which only
then is rounded to float16, so a code is not always the nearest on the grid that the file gets.

    farthest    the weight farthest from zero becomes the first level           q4_0 q5_0
    minmax      the lowest weight becomes the offset, the highest the top       q4_1 q5_1
    absmax      the weight farthest from zero becomes plus or minus the top     q8_0 tq1_0 tq2_0

All take blocks w float32 (n, block) and levels int8, and give codes uint8 (n, block) and their Grid.

Source: ggml-quants.c, quantize_row_*_ref; gguf-py, quants.py.
"""

import numpy as np

from .grid import Grid, inverse

HALF = np.float32(0.5)


def farthest(w: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, Grid]:
    """Codes and grid; of two weights equally far from zero the first one counts."""
    at = np.abs(w).argmax(axis=1, keepdims=True)
    scale = np.take_along_axis(w, at, axis=1) / np.float32(levels[0])
    codes = (w * inverse(scale) + (HALF - np.float32(levels[0]))).astype(np.uint8)
    return np.minimum(codes, len(levels) - 1), Grid(levels, scale.astype("<f2"))


def minmax(w: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, Grid]:
    """Codes and grid."""
    low, high = (ends(axis=1, keepdims=True) + np.float32(0) for ends in (w.min, w.max))  # no minus zero
    scale = (high - low) / np.float32(levels[-1])
    codes = ((w - low) * inverse(scale) + HALF).astype(np.uint8)
    return np.minimum(codes, levels[-1]), Grid(levels, scale.astype("<f2"), low.astype("<f2"))


def absmax(w: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, Grid]:
    """Codes and grid; halves are rounded away from zero."""
    scale = np.abs(w).max(axis=1, keepdims=True) / np.float32(levels[-1])
    v = w * inverse(scale)
    whole = np.floor(np.abs(v))
    whole += np.abs(v) - whole >= HALF
    return (np.copysign(whole, v) - np.float32(levels[0])).astype(np.uint8), Grid(levels, scale.astype("<f2"))
