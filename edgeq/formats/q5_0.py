"""Q5_0: 5 bits, symmetric, one scale for 32 weights. 5.5 bits per weight.

    byte  0..1    d    f16 scale
    byte  2..5    qh   bit j of the 32 (little-endian): top bit of code j
    byte  6..21   qs   byte j: low nibble, low four bits of code j; high nibble, of code j + 16

    w = d * (code - 16)

Source: ggml-common.h, block_q5_0.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..rounding import farthest
from ..search import Space

GGML, BLOCK, BYTES = 6, 32, 22
LEVELS = np.arange(-16, 16, dtype=np.int8)
SPACE = Space(LEVELS, group=32, rounding=farthest)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 22) -> codes uint8 (n, 32), Grid with one f16 scale a row."""
    high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    qs = blocks[:, 6:]
    codes = np.concatenate([qs & 15, qs >> 4], axis=1) | high << 4
    return codes, Grid(LEVELS, np.ascontiguousarray(blocks[:, :2]).view("<f2"))


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 32); importance as w."""
    return search.fit(w, importance, SPACE)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 32), Grid of n rows -> uint8 (n, 22)."""
    high = np.packbits(codes >> 4, axis=1, bitorder="little")
    qs = codes[:, :16] & 15 | codes[:, 16:] << 4
    return np.concatenate([grid.scale.view(np.uint8), high, qs], axis=1)
