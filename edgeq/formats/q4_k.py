"""Q4_K: 4 bits with offset, groups of 32 weights; 6-bit scales and offsets in units of a block of 256.
4.5 bits per weight.

    byte   0..1     d       f16 unit of the scales
    byte   2..3     dmin    f16 unit of the offsets
    byte   4..15    scales  8 x 6-bit scale s, 8 x 6-bit offset m, packed as drawn below
    byte  16..143   qs      4 runs of 32 bytes; run r: low nibbles are group 2r, high nibbles group 2r + 1

    The twelve bytes of scales, for j = 0..3, high bit first:

        byte j      S S s s s s s s      s: scale j                          S: high two bits of scale j + 4
        byte j + 4  M M m m m m m m      m: offset j                         M: high two bits of offset j + 4
        byte j + 8  m m m m s s s s      s: low four bits of scale j + 4     m: low four bits of offset j + 4

    w = d * s * code - dmin * m

Source: ggml-common.h, block_q4_K.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..search import Space

GGML, BLOCK, BYTES = 12, 256, 144
LEVELS = np.arange(16, dtype=np.int8)
SPACE = Space(LEVELS, group=32, steps=(0, 63), offset=True)


def unpack_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (n, 12) -> six-bit scales and offsets, uint8 (n, 8) each."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=1)
    offsets = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=1)
    return scales, offsets


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 144) -> codes uint8 (n, 256), Grid with 8 groups a row."""
    units = np.ascontiguousarray(blocks[:, :4]).view("<f2")
    scales, offsets = unpack_scales(blocks[:, 4:16])
    qs = blocks[:, 16:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(-1, BLOCK)
    return codes, Grid(LEVELS, units[:, :1], -units[:, 1:], scales, offsets)


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 256); importance as w."""
    return search.fit(w, importance, SPACE)


def pack_scales(scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Six-bit scales and offsets, uint8 (n, 8) each -> uint8 (n, 12)."""
    a = scales[:, :4] | scales[:, 4:] >> 4 << 6
    b = offsets[:, :4] | offsets[:, 4:] >> 4 << 6
    return np.concatenate([a, b, scales[:, 4:] & 15 | offsets[:, 4:] << 4], axis=1)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 256), Grid of n rows -> uint8 (n, 144)."""
    units = np.concatenate([grid.scale, -grid.offset], axis=1).view(np.uint8)
    pairs = codes.reshape(-1, 4, 2, 32)
    qs = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([units, pack_scales(grid.scale_steps, grid.offset_steps), qs], axis=1)
