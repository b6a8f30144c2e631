"""Q3_K: 3 bits, symmetric, groups of 16 weights; 6-bit scales in units of a block of 256.
3.4375 bits per weight.

    byte    0..31    hmask   byte j, bit k: top bit of code 32k + j
    byte   32..95    qs      low two bits of the codes, laid out as in Q2_K
    byte   96..107   scales  16 x 6-bit scale s + 32, packed as drawn below
    byte  108..109   d       f16 unit of the scales

    The twelve bytes of scales, for j = 0..7 and j = 0..3, high bit first:

        byte j      h h h h l l l l      low four bits of scale j (l) and of scale j + 8 (h)
        byte j + 8  d d c c b b a a      high two bits of scales j (a), j + 4 (b), j + 8 (c), j + 12 (d)

    w = d * s * (code - 4)

Source: ggml-common.h, block_q3_K.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..search import Space

GGML, BLOCK, BYTES = 11, 256, 110
LEVELS = np.arange(-4, 4, dtype=np.int8)
SHIFTS = np.array([[0], [2], [4], [6]], dtype=np.uint8)
SPACE = Space(LEVELS, group=16, steps=(-32, 31))


def unpack_scales(packed: np.ndarray) -> np.ndarray:
    """uint8 (n, 12) -> six-bit scales int8 (n, 16)."""
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = (packed[:, None, 8:] >> SHIFTS & 3).reshape(-1, 16)
    return (low | high << 4).view(np.int8) - 32


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 110) -> codes uint8 (n, 256), Grid with 16 groups a row."""
    high = np.unpackbits(blocks[:, :32, None], axis=2, bitorder="little").swapaxes(1, 2)
    low = blocks[:, 32:96].reshape(-1, 2, 1, 32) >> SHIFTS & 3
    codes = low.reshape(-1, 8, 32) | high << 2
    unit = np.ascontiguousarray(blocks[:, 108:]).view("<f2")
    return codes.reshape(-1, BLOCK), Grid(LEVELS, unit, scale_steps=unpack_scales(blocks[:, 96:108]))


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 256); importance as w."""
    return search.fit(w, importance, SPACE)


def pack_scales(steps: np.ndarray) -> np.ndarray:
    """Six-bit scales int8 (n, 16) -> uint8 (n, 12)."""
    biased = (steps + 32).view(np.uint8)
    low = biased[:, :8] & 15 | biased[:, 8:] << 4
    high = np.bitwise_or.reduce((biased >> 4).reshape(-1, 4, 4) << SHIFTS, axis=1)
    return np.concatenate([low, high], axis=1)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 256), Grid of n rows -> uint8 (n, 110)."""
    high = np.packbits((codes >> 2).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    qs = np.bitwise_or.reduce((codes & 3).reshape(-1, 2, 4, 32) << SHIFTS, axis=2).reshape(-1, 64)
    return np.concatenate([high, qs, pack_scales(grid.scale_steps), grid.scale.view(np.uint8)], axis=1)
