"""Q5_1: 5 bits with offset, one scale and one offset for 32 weights. 6 bits per weight.

    byte  0..1    d    f16 scale
    byte  2..3    m    f16 offset
    byte  4..7    qh   bit j of the 32 (little-endian): top bit of code j
    byte  8..23   qs   byte j: low nibble, low four bits of code j; high nibble, of code j + 16

    w = d * code + m

Source: ggml-common.h, block_q5_1.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..rounding import minmax
from ..search import Space

GGML, BLOCK, BYTES = 7, 32, 24
LEVELS = np.arange(32, dtype=np.int8)
SPACE = Space(LEVELS, group=32, offset=True, rounding=minmax)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 24) -> codes uint8 (n, 32), Grid with one f16 scale and one f16 offset a row."""
    units = np.ascontiguousarray(blocks[:, :4]).view("<f2")
    high = np.unpackbits(blocks[:, 4:8], axis=1, bitorder="little")
    qs = blocks[:, 8:]
    codes = np.concatenate([qs & 15, qs >> 4], axis=1) | high << 4
    return codes, Grid(LEVELS, units[:, :1], units[:, 1:])


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 32); importance as w."""
    return search.fit(w, importance, SPACE)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 32), Grid of n rows -> uint8 (n, 24)."""
    high = np.packbits(codes >> 4, axis=1, bitorder="little")
    qs = codes[:, :16] & 15 | codes[:, 16:] << 4
    return np.concatenate([grid.scale.view(np.uint8), grid.offset.view(np.uint8), high, qs], axis=1)
