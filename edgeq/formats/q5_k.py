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

from .. import search
from ..grid import Grid
from ..search import Space
from .q4_k import pack_scales, unpack_scales

GGML, BLOCK, BYTES = 13, 256, 176
LEVELS = np.arange(32, dtype=np.int8)
SPACE = Space(LEVELS, group=32, steps=(0, 63), offset=True)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 176) -> codes uint8 (n, 256), Grid with 8 groups a row."""
    units = np.ascontiguousarray(blocks[:, :4]).view("<f2")
    scales, offsets = unpack_scales(blocks[:, 4:16])
    high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").swapaxes(1, 2)
    qs = blocks[:, 48:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(-1, 8, 32) | high << 4
    return codes.reshape(-1, BLOCK), Grid(LEVELS, units[:, :1], -units[:, 1:], scales, offsets)


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 256); importance as w."""
    return search.fit(w, importance, SPACE)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 256), Grid of n rows -> uint8 (n, 176)."""
    units = np.concatenate([grid.scale, -grid.offset], axis=1).view(np.uint8)
    high = np.packbits((codes >> 4).reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)
    pairs = codes.reshape(-1, 4, 2, 32)
    qs = (pairs[:, :, 0] & 15 | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([units, pack_scales(grid.scale_steps, grid.offset_steps), high, qs], axis=1)
