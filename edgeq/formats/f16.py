"""F16: IEEE 754 binary16, little-endian. 16 bits per weight.

    byte 0..1    w

Source: ggml.h, GGML_TYPE_F16; safetensors dtype F16.
"""

import numpy as np

GGML, BLOCK, BYTES = 1, 1, 2
LARGEST = 65504


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    """uint8 (n, 2) -> values float16 (n, 1), no grid."""
    return blocks.view("<f2"), None


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> None:
    """Values have no grid."""


def pack(values: np.ndarray, grid: None = None) -> np.ndarray:
    """values (n, 1) -> uint8 (n, 2), rounded to the nearest; beyond 65504 it is infinity."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, "<f2").view(np.uint8)
