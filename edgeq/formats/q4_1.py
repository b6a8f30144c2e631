"""Q4_1: 4 bits with offset, one scale and one offset for 32 weights. 5 bits per weight.

    byte  0..1    d    f16 scale
    byte  2..3    m    f16 offset
    byte  4..19   qs   byte j: low nibble code j, high nibble code j + 16

    w = d * code + m

Source: ggml-common.h, block_q4_1.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..rounding import minmax
from ..search import Space

GGML, BLOCK, BYTES = 3, 32, 20
LEVELS = np.arange(16, dtype=np.int8)
SPACE = Space(LEVELS, group=32, offset=True, rounding=minmax)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 20) -> codes uint8 (n, 32), Grid with one f16 scale and one f16 offset a row."""
    units = np.ascontiguousarray(blocks[:, :4]).view("<f2")
    qs = blocks[:, 4:]
    codes = np.concatenate([qs & 15, qs >> 4], axis=1)
    return codes, Grid(LEVELS, units[:, :1], units[:, 1:])


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 32); importance as w."""
    return search.fit(w, importance, SPACE)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 32), Grid of n rows -> uint8 (n, 20)."""
    qs = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate([grid.scale.view(np.uint8), grid.offset.view(np.uint8), qs], axis=1)
