"""TQ2_0: ternary in 2 bits, one scale for 256 weights. 2.0625 bits per weight.

    byte   0..63   qs   2 runs of 32 bytes, one for 128 weights; bits 2k, 2k + 1 of byte j: code 32k + j
    byte  64..65   d    f16 scale

    w = d * (code - 1)

Encoders write codes 0, 1 and 2 only. Code 3 is in no valid file; it stands for 2, as ggml decodes it.

Source: ggml-common.h, block_tq2_0.
"""

import numpy as np

from ..grid import Grid

GGML, BLOCK, BYTES = 35, 256, 66
LEVELS = np.array([-1, 0, 1, 2], dtype=np.int8)
SHIFTS = np.array([[0], [2], [4], [6]], dtype=np.uint8)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 66) -> codes uint8 (n, 256), Grid with one f16 scale a row."""
    codes = blocks[:, :64].reshape(-1, 2, 1, 32) >> SHIFTS & 3
    return codes.reshape(-1, BLOCK), Grid(LEVELS, np.ascontiguousarray(blocks[:, 64:]).view("<f2"))
