"""Inputs: how the numbers that a matrix is multiplied with are rounded to 8 bits, where its file says so.

    x ≈ scale * (q - zero)        q = -128 … 127

    static     tensor    scale and zero are fixed; calibration found them
    dynamic    token     scale = max|x| / 127 of a token, when it is there
               block     the same of 32 neighbors in a token

A file that says nothing leaves it to who computes. One that does was made, and measured, with just these
codes, so they are taken for one token as for many.
"""

from typing import NamedTuple

import numpy as np

SHARES = ("tensor", "token", "block")
BLOCK, LARGEST = 32, 127
SMALLEST = 1e-37  # a scale below it has no finite inverse, and stands for zeros


class Inputs(NamedTuple):
    """What shares a scale.

    Attributes
    ----------
    share : one of SHARES.
    scale, zero : of "tensor".
    """

    share: str
    scale: float = 0.0
    zero: int = 0


def encode(x: np.ndarray, inputs: Inputs, largest: int = LARGEST) -> tuple[np.ndarray, np.ndarray]:
    """Codes float32, as x (n, cols), and scales float32 (n, groups).

    largest : code of dynamic scales, where there are more of them.
    """
    n, cols = x.shape
    size = BLOCK if inputs.share == "block" else cols
    groups = np.pad(x, ((0, 0), (0, -cols % size))).reshape(n, -1, size)
    if inputs.share == "tensor":
        scale = np.full((n, 1), inputs.scale, np.float32)
    else:
        scale = np.abs(groups).max(axis=2) / np.float32(largest)
    over = np.divide(1, scale, out=np.zeros_like(scale), where=scale > SMALLEST)
    codes = np.rint(np.clip(groups * over[:, :, None] + np.float32(inputs.zero), -largest - 1, largest))
    return codes.reshape(n, -1)[:, :cols], scale


def rounded(x: np.ndarray, inputs: Inputs | None) -> np.ndarray:
    """What becomes of x float32 (n, cols); what is no finite number stays none."""
    if inputs is None:
        return x
    with np.errstate(invalid="ignore"):  # an infinite number has an infinite scale
        codes, scale = encode(x, inputs)
        of_column = np.repeat(scale, BLOCK if inputs.share == "block" else x.shape[1], axis=1)
        near = (codes - np.float32(inputs.zero)) * of_column[:, : x.shape[1]]
    return np.where(np.isfinite(x), near, np.float32(np.nan))
