"""F32: IEEE 754 binary32, little-endian. 32 bits per weight.

    byte 0..3    w

Source: ggml.h, GGML_TYPE_F32; safetensors dtype F32.
"""

import numpy as np

GGML, BLOCK, BYTES = 0, 1, 4


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    """uint8 (n, 4) -> values float32 (n, 1), no grid."""
    return blocks.view("<f4"), None


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> None:
    """Values have no grid."""


def pack(values: np.ndarray, grid: None = None) -> np.ndarray:
    """values (n, 1) -> uint8 (n, 4)."""
    return np.ascontiguousarray(values, "<f4").view(np.uint8)
