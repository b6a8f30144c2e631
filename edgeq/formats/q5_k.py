"""Q5_K: 5 bits with offset, groups of 32 weights; 6-bit scales and offsets in units of a block of 256.
5.5 bits per weight.

    byte   0..1     d       f16 unit of the scales
    byte   2..3     dmin    f16 unit of the offsets
    byte   4..15    scales  8 x 6-bit scale s, 8 x 6-bit offset m, packed as in Q4_K
    byte  16..47    qh      byte j, bit k: top bit of code j of group k
    byte  48..175   qs      low four bits, 4 runs of 32 bytes; run r: low nibbles group 2r, high 2r + 1

    w = d * s * code - dmin * m

Source: ggml-common.h, block_q5_K.
"""

import numpy as np

from ..grid import Grid
from .q4_k import unpack_scales

GGML, BLOCK, BYTES = 13, 256, 176
LEVELS = np.arange(32, dtype=np.int8)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 176) -> codes uint8 (n, 256), Grid with 8 groups a row."""
    units = np.ascontiguousarray(blocks[:, :4]).view("<f2")
    scales, offsets = unpack_scales(blocks[:, 4:16])
    high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").swapaxes(1, 2)
    qs = blocks[:, 48:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(-1, 8, 32) | high << 4
    return codes.reshape(-1, BLOCK), Grid(LEVELS, units[:, :1], -units[:, 1:], scales, offsets)
