"""MXFP4: 4-bit floats, a power of two as the scale of 32 weights. 4.25 bits per weight.

    byte  0       e    E8M0 scale, 2**(e - 127)
    byte  1..16   qs   byte j: low nibble code j, high nibble code j + 16

    w = 2**(e - 128) * levels[code]

A code is an E2M1 float, sign in bit 3: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. The levels are twice
that, to be integers, and the scale is half of what e says.

Like ggml, and unlike OCP's specification, e = 255 is a scale and not NaN.

Source: OCP Microscaling Formats v1.0; ggml-common.h, block_mxfp4 and kvalues_mxfp4.
"""

import numpy as np

from ..grid import Grid, decode, encode

GGML, BLOCK, BYTES = 39, 32, 17
LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int8)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 17) -> codes uint8 (n, 32), Grid with one float32 scale a row, exact even where denormal."""
    qs = blocks[:, 1:]
    codes = np.concatenate([qs & 15, qs >> 4], axis=1)
    return codes, Grid(LEVELS, np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128))


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 32); importance as w.

    OCP's scale puts the largest weight between the levels 8 and 16 of which the last is 12. Given importance,
    the scales next to it are tried, too.
    """
    largest = np.abs(w).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        e = np.floor(np.log2(largest)) + 125
    if importance is None:
        return _grid(e)
    tried = [_grid(e + step) for step in (0, -1, 1)]
    errors = [(importance * (w - decode(encode(w, g), g)) ** 2).sum(axis=1) for g in tried]
    return _grid(e + np.array([0, -1, 1])[np.argmin(errors, axis=0)][:, None])


def _grid(e: np.ndarray) -> Grid:
    """Grid of scales 2**(e - 128), e as near as E8M0 has it."""
    return Grid(LEVELS, np.ldexp(np.float32(1), np.clip(e, 0, 254).astype(np.int32) - 128))


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 32), Grid of n rows whose scales are powers of two -> uint8 (n, 17)."""
    e = np.frexp(grid.scale)[1] + 127  # frexp's fraction is 1/2
    return np.concatenate([e.astype(np.uint8), codes[:, :16] | codes[:, 16:] << 4], axis=1)
