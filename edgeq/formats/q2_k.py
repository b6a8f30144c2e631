"""Q2_K: 2 bits with offset, groups of 16 weights; 4-bit scales and offsets in units of a block of 256.
2.625 bits per weight.

    byte   0..15   scales  16 x 4-bit scale s (low nibble) and 4-bit offset m (high nibble)
    byte  16..79   qs      2 runs of 32 bytes, one for 128 weights; bits 2k, 2k + 1 of byte j: code 32k + j
    byte  80..81   d       f16 unit of the scales
    byte  82..83   dmin    f16 unit of the offsets

    w = d * s * code - dmin * m

Source: ggml-common.h, block_q2_K.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..search import Space

GGML, BLOCK, BYTES = 10, 256, 84
LEVELS = np.arange(4, dtype=np.int8)
SHIFTS = np.array([[0], [2], [4], [6]], dtype=np.uint8)
SPACE = Space(LEVELS, group=16, steps=(0, 15), offset=True)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 84) -> codes uint8 (n, 256), Grid with 16 groups a row."""
    scales = blocks[:, :16]
    codes = blocks[:, 16:80].reshape(-1, 2, 1, 32) >> SHIFTS & 3
    units = np.ascontiguousarray(blocks[:, 80:]).view("<f2")
    grid = Grid(LEVELS, units[:, :1], -units[:, 1:], scales & 15, scales >> 4)
    return codes.reshape(-1, BLOCK), grid


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 256); importance as w."""
    return search.fit(w, importance, SPACE)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 256), Grid of n rows -> uint8 (n, 84)."""
    scales = grid.scale_steps | grid.offset_steps << 4
    qs = np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << SHIFTS, axis=2).reshape(-1, 64)
    units = np.concatenate([grid.scale, -grid.offset], axis=1).view(np.uint8)
    return np.concatenate([scales, qs, units], axis=1)
