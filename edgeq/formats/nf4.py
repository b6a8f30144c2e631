"""NF4: 4 bits on a table whose levels a normal distribution uses equally often, a scale for a run of columns.
4 bits per weight, and the scales.

    byte  0    high nibble code 0, low nibble code 1
    scale      an array of its own, in Tensor.parts: float32 (rows, groups), the largest magnitude of a group

    w = scale * levels[code]

Source: Dettmers et al., QLoRA, arXiv 2305.14314, section 3 and appendix E.
"""

import numpy as np

from ..grid import Grid

GGML, BLOCK, BYTES = None, 2, 1
PARTS = ("scale",)
GROUP = 64
SHIFTS = np.array([4, 0], dtype=np.uint8)
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)  # fmt: skip


def unpack(blocks: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, Grid]:
    """uint8 (n, 1), float32 (rows, groups) -> codes uint8 (n, 2), Grid of the rows."""
    return blocks >> SHIFTS & 15, Grid(LEVELS, scale.reshape(len(scale), -1))


def fit(w: np.ndarray, importance: np.ndarray | None = None, *, group: int = GROUP) -> Grid:
    """Grid of the rows w float32 (rows, cols): all values are covered, whatever their importance; rows that
    are no whole groups are one.
    """
    rows, cols = w.shape
    return Grid(LEVELS, np.abs(w).reshape(rows, -1, cols if cols % group else group).max(axis=2))


def pack(codes: np.ndarray, grid: Grid) -> np.ndarray:
    """codes uint8 (n, 2) -> uint8 (n, 1)."""
    return np.bitwise_or.reduce(codes << SHIFTS, axis=1)[:, None]


def parts(grid: Grid) -> dict[str, np.ndarray]:
    """What Tensor.parts holds."""
    return {"scale": grid.scale}
