"""TQ1_0: ternary, five codes in a byte, one scale for 256 weights. 1.6875 bits per weight.

    byte   0..31   codes    0..159, code 32k + j is digit k of byte j,            k = 0..4
    byte  32..47   codes  160..239, code 160 + 16k + j is digit k of byte 32 + j, k = 0..4
    byte  48..51   codes  240..255, code 240 + 4k + j is digit k of byte 48 + j,  k = 0..3
    byte  52..53   d      f16 scale

    w = d * (code - 1)

byte / 256 is a fraction that holds its base-3 digits after the point. Multiplying by three moves the next
digit before the point: digit k is floor(3 * frac(3**k * byte / 256)), without a division. An encoder writes
ceil(256 / 243 * number), where number is the five digits read as an integer.

Source: ggml-common.h, block_tq1_0.
"""

import numpy as np

from .. import search
from ..grid import Grid
from ..rounding import absmax
from ..search import Space

GGML, BLOCK, BYTES = 34, 256, 54
LEVELS = np.array([-1, 0, 1], dtype=np.int8)
POWERS = np.array([[1], [3], [9], [27], [81]], dtype=np.uint8)
SPACE = Space(LEVELS, group=256, rounding=absmax)


def digits(packed: np.ndarray, count: int) -> np.ndarray:
    """uint8 (n, bytes) -> the first base-3 digits of each byte, uint8 (n, count * bytes), digit by digit."""
    fraction = packed[:, None] * POWERS[:count]  # modulo 256: drops the digits before the point
    return (fraction.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(-1, count * packed.shape[1])


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 54) -> codes uint8 (n, 256), Grid with one f16 scale a row."""
    runs = digits(blocks[:, :32], 5), digits(blocks[:, 32:48], 5), digits(blocks[:, 48:52], 4)
    return np.concatenate(runs, axis=1), Grid(LEVELS, np.ascontiguousarray(blocks[:, 52:]).view("<f2"))


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> Grid:
    """Grid of the blocks w float32 (n, 256); importance as w."""
    return search.fit(w, importance, SPACE)


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 256) below 3, Grid of n rows -> uint8 (n, 54)."""
    runs = np.split(codes, [160, 240], axis=1)
    numbers = [
        (run.reshape(len(codes), count, -1) * POWERS[4::-1][:count]).sum(axis=1, dtype=np.uint16)
        for run, count in zip(runs, (5, 5, 4), strict=True)
    ]
    packed = (np.concatenate(numbers, axis=1) * 256 + 242) // 243
    return np.concatenate([packed.astype(np.uint8), grid.scale.view(np.uint8)], axis=1)
