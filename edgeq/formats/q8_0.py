"""Q8_0: 8 bits, symmetric, one scale for 32 weights. 8.5 bits per weight.

    byte  0..1    d    f16 scale
    byte  2..33   qs   byte j: int8 code j - 128, that is code j with its top bit flipped

    w = d * (code - 128)

Source: ggml-common.h, block_q8_0.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..rounding import absmax
from ..search import Space

GGML, BLOCK, BYTES = 8, 32, 34
LEVELS = np.arange(-128, 128, dtype=np.int8)
SPACE = Space(LEVELS, group=32, rounding=absmax)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 34) -> codes uint8 (n, 32), Grid with one f16 scale a row."""
    return blocks[:, 2:] ^ 128, Grid(LEVELS, np.ascontiguousarray(blocks[:, :2]).view("<f2"))


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 32); importance as w."""
    return search.fit(w, importance, SPACE)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 32), Grid of n rows -> uint8 (n, 34)."""
    return np.concatenate([grid.scale.view(np.uint8), codes ^ 128], axis=1)
