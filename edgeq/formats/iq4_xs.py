"""IQ4_XS: 4 bits on the table of IQ4_NL, groups of 32 weights; 6-bit scales in units of a block of 256.
4.25 bits per weight.

    byte  0..1     d         f16 unit of the scales
    byte  2..3     scales_h  bits 2k, 2k + 1 of the 16 (little-endian): high two bits of scale k
    byte  4..7     scales_l  byte j: low four bits of scale 2j (low nibble) and of scale 2j + 1 (high nibble)
    byte  8..135   qs        one run of 16 bytes a group; byte j: low nibble code j, high nibble code j + 16

    w = d * s * levels[code]        s is the 6-bit scale less 32

Source: ggml-common.h, block_iq4_xs and kvalues_iq4nl.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..search import Space
from .iq4_nl import LEVELS

GGML, BLOCK, BYTES = 23, 256, 136
SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)
SPACE = Space(LEVELS, group=32, steps=(-32, 31))


def unpack_scales(packed: np.ndarray) -> np.ndarray:
    """uint8 (n, 6), scales_h and scales_l -> six-bit scales int8 (n, 8)."""
    high = (packed[:, :2, None] >> SHIFTS & 3).reshape(-1, 8)
    low = np.stack([packed[:, 2:] & 15, packed[:, 2:] >> 4], axis=2).reshape(-1, 8)
    return (low | high << 4).view(np.int8) - 32


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 136) -> codes uint8 (n, 256), Grid with 8 groups a row."""
    unit = np.ascontiguousarray(blocks[:, :2]).view("<f2")
    qs = blocks[:, 8:].reshape(-1, 8, 16)
    codes = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(-1, BLOCK)
    return codes, Grid(LEVELS, unit, scale_steps=unpack_scales(blocks[:, 2:8]))


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 256); importance as w."""
    return search.fit(w, importance, SPACE)


def pack_scales(steps: np.ndarray) -> np.ndarray:
    """Six-bit scales int8 (n, 8) -> uint8 (n, 6), scales_h and scales_l."""
    biased = (steps + 32).view(np.uint8)
    high = np.bitwise_or.reduce((biased >> 4).reshape(-1, 2, 4) << SHIFTS, axis=2)
    return np.concatenate([high, biased[:, ::2] & 15 | biased[:, 1::2] << 4], axis=1)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 256), Grid of n rows -> uint8 (n, 136)."""
    pairs = codes.reshape(-1, 8, 2, 16)
    qs = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([grid.scale.view(np.uint8), pack_scales(grid.scale_steps), qs], axis=1)
