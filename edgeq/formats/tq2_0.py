"""TQ2_0: ternary in 2 bits, one scale for 256 weights. 2.0625 bits per weight.

    byte   0..63   qs   2 runs of 32 bytes, one for 128 weights; bits 2k, 2k + 1 of byte j: code 32k + j
    byte  64..65   d    f16 scale

    w = d * (code - 1)

Encoders write codes 0, 1 and 2 only. Code 3 is in no valid file; it stands for 2, as ggml decodes it.

Source: ggml-common.h, block_tq2_0.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..rounding import absmax
from ..search import Space

GGML, BLOCK, BYTES = 35, 256, 66
LEVELS = np.array([-1, 0, 1, 2], dtype=np.int8)
SHIFTS = np.array([[0], [2], [4], [6]], dtype=np.uint8)
SPACE = Space(LEVELS[:3], group=256, rounding=absmax)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 66) -> codes uint8 (n, 256), Grid with one f16 scale a row."""
    codes = blocks[:, :64].reshape(-1, 2, 1, 32) >> SHIFTS & 3
    return codes.reshape(-1, BLOCK), Grid(LEVELS, np.ascontiguousarray(blocks[:, 64:]).view("<f2"))


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 256); importance as w."""
    return search.fit(w, importance, SPACE)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 256) below 3, Grid of n rows -> uint8 (n, 66)."""
    qs = np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << SHIFTS, axis=2).reshape(-1, 64)
    return np.concatenate([qs, grid.scale.view(np.uint8)], axis=1)
