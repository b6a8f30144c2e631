"""BF16: the upper half of an IEEE 754 binary32, little-endian. 16 bits per weight.

    byte 0..1    bits 16..31 of w, the others are zero

Source: ggml.h, ggml_bf16_t; safetensors dtype BF16.
"""

import numpy as np

GGML, BLOCK, BYTES = 30, 1, 2


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    """uint8 (n, 2) -> values float32 (n, 1), no grid; NumPy has no bfloat16, so they come widened."""
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32), None


def fit(w: np.ndarray, importance: np.ndarray | None = None) -> None:
    """Values have no grid."""


def pack(values: np.ndarray, grid: None = None) -> np.ndarray:
    """values (n, 1) -> uint8 (n, 2), rounded to the nearest, to even in the middle; NaN stays NaN."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    upper = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    quiet = bits >> 16 | 64  # a NaN whose payload lies in the lower half would else become infinity
    return np.where(np.isnan(values), quiet, upper).astype("<u2").view(np.uint8)
