"""F16: IEEE 754 binary16, little-endian. 16 bits per weight.

    byte 0..1    w

Source: ggml.h, GGML_TYPE_F16; safetensors dtype F16.
"""

import numpy as np

GGML, BLOCK, BYTES = 1, 1, 2


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    """uint8 (n, 2) -> values float16 (n, 1), no grid."""
    return blocks.view("<f2"), None
