"""Q5_0: 5 bits, symmetric, one scale for 32 weights. 5.5 bits per weight.

    byte  0..1    d    f16 scale
    byte  2..5    qh   bit j of the 32 (little-endian): top bit of code j
    byte  6..21   qs   byte j: low nibble, low four bits of code j; high nibble, of code j + 16

    w = d * (code - 16)

Source: ggml-common.h, block_q5_0.
"""

import numpy as np

from ..grid import Grid

GGML, BLOCK, BYTES = 6, 32, 22
LEVELS = np.arange(-16, 16, dtype=np.int8)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 22) -> codes uint8 (n, 32), Grid with one f16 scale a row."""
    high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    qs = blocks[:, 6:]
    codes = np.concatenate([qs & 15, qs >> 4], axis=1) | high << 4
    return codes, Grid(LEVELS, np.ascontiguousarray(blocks[:, :2]).view("<f2"))
