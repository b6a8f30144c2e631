"""I8: 8-bit integers, one scale for a row. 8 bits per weight, and the scale.

    byte  0       int8 code - 128, that is the code with its top bit flipped
    scale (rows,) an array of its own, in Tensor.parts

    w = scale[row] * (code - 128)

W8A8 checkpoints store their linear layers so. ggml's I8 has no scale, its integers are plain values: without
the part they unpack as a float format does, values and no grid.

Source: ggml.h, GGML_TYPE_I8; safetensors dtype I8.
"""

import numpy as np

from ..grid import Grid

GGML, BLOCK, BYTES = 24, 1, 1
LEVELS = np.arange(-128, 128, dtype=np.int8)


def unpack(blocks: np.ndarray, scale: np.ndarray | None = None) -> tuple[np.ndarray, Grid | None]:
    """uint8 (n, 1), float (rows,) -> codes uint8 (n, 1), Grid with one scale a row; or values int8 (n, 1)."""
    if scale is None:
        return blocks.view(np.int8), None
    return blocks ^ 128, Grid(LEVELS, scale.reshape(-1, 1))
