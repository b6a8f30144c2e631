"""IQ4_NL: 4 bits on a non-uniform table, one scale for 32 weights. 4.5 bits per weight.

    byte  0..1    d    f16 scale
    byte  2..17   qs   byte j: low nibble code j, high nibble code j + 16

    w = d * levels[code]

The sixteen levels are dense around zero, where trained weights are.

Source: ggml-common.h, block_iq4_nl and kvalues_iq4nl.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..search import Space

GGML, BLOCK, BYTES = 20, 32, 18
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)
SPACE = Space(LEVELS, group=32)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 18) -> codes uint8 (n, 32), Grid with one f16 scale a row."""
    qs = blocks[:, 2:]
    codes = np.concatenate([qs & 15, qs >> 4], axis=1)
    return codes, Grid(LEVELS, np.ascontiguousarray(blocks[:, :2]).view("<f2"))


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 32); importance as w."""
    return search.fit(w, importance, SPACE)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 32), Grid of n rows -> uint8 (n, 18)."""
    qs = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate([grid.scale.view(np.uint8), qs], axis=1)
