"""Q6_K: 6 bits, symmetric, groups of 16 weights; 8-bit scales in units of a block of 256.
6.5625 bits per weight.

    byte    0..127   ql      low four bits of the codes, 2 runs of 64 bytes, one for 128 weights
    byte  128..191   qh      top two bits of the codes, 2 runs of 32 bytes
    byte  192..207   scales  16 x int8 scale s
    byte  208..209   d       f16 unit of the scales

    A run holds four quarters of 32 weights; code j of

        quarter    low four bits                top two bits
        0          ql[j]        low nibble      qh[j]  bits 0, 1
        1          ql[j + 32]   low nibble      qh[j]  bits 2, 3
        2          ql[j]        high nibble     qh[j]  bits 4, 5
        3          ql[j + 32]   high nibble     qh[j]  bits 6, 7

    w = d * s * (code - 32)

Source: ggml-common.h, block_q6_K.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..search import Space

GGML, BLOCK, BYTES = 14, 256, 210
LEVELS = np.arange(-32, 32, dtype=np.int8)
SHIFTS = np.array([[0], [2], [4], [6]], dtype=np.uint8)
SPACE = Space(LEVELS, group=16, steps=(-128, 127))


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 210) -> codes uint8 (n, 256), Grid with 16 groups a row."""
    ql = blocks[:, :128].reshape(-1, 2, 2, 32)
    qh = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    codes = np.concatenate([ql & 15, ql >> 4], axis=2) | (qh >> SHIFTS & 3) << 4
    unit = np.ascontiguousarray(blocks[:, 208:]).view("<f2")
    steps = blocks[:, 192:208].view(np.int8)
    return codes.reshape(-1, BLOCK), Grid(LEVELS, unit, scale_steps=steps)


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 256); importance as w."""
    return search.fit(w, importance, SPACE)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 256), Grid of n rows -> uint8 (n, 210)."""
    quarters = codes.reshape(-1, 2, 4, 32)
    ql = (quarters[:, :, :2] & 15 | quarters[:, :, 2:] << 4).reshape(-1, 128)
    qh = np.bitwise_or.reduce(quarters >> 4 << SHIFTS, axis=2).reshape(-1, 64)
    return np.concatenate([ql, qh, grid.scale_steps.view(np.uint8), grid.scale.view(np.uint8)], axis=1)
