"""The health of a tensor: what its own numbers tell, without the original.

    not finite    scales, offsets or values that are NaN or infinite
    dead          groups whose weights are all equal: a quantizer that saw nothing, or bytes that never came
    saturated     groups with more than half of their weights on the first or last level: too small a scale

A group is what shares a scale; in float formats, a row. Vectors have none: a norm of ones is no illness.
"""

from typing import NamedTuple

import numpy as np

from .. import files, formats
from ..grid import Grid, expand
from ..tensor import Tensor
from .distance import panels

ENOUGH_LEVELS = 8  # of a format whose groups can be saturated: with fewer, half the weights lie at the ends


class Health(NamedTuple):
    """How many groups there are, numbers that are not finite, dead groups and saturated ones."""

    groups: int
    not_finite: int
    dead: int
    saturated: int


def health(tensor: Tensor) -> Health:
    """Look at a tensor, a few rows at a time."""
    seen = np.zeros(4, np.int64)
    for start, stop in panels(tensor):
        codes, grid = formats.unpack(tensor, start, stop)
        numbers = [codes] if grid is None else [x for x in (grid.scale, grid.offset) if x is not None]
        not_finite = sum(int(np.count_nonzero(~np.isfinite(x))) for x in numbers)
        groups, dead, saturated = _groups(codes, grid) if len(tensor.shape) > 1 else (0, 0, 0)
        seen += np.array([groups, not_finite, dead, saturated])
        files.release(tensor.data)
    return Health(*seen.tolist())


def _groups(codes: np.ndarray, grid: Grid | None) -> tuple[int, int, int]:
    """Groups of the codes (rows, cols), and how many of them are dead and saturated."""
    if grid is None:
        return len(codes), int((codes.min(axis=1) == codes.max(axis=1)).sum()), 0
    scale = expand(grid.scale, grid.scale_steps).reshape(-1)
    groups = codes.reshape(len(scale), -1)
    dead = (scale == 0) | (groups.min(axis=1) == groups.max(axis=1))
    if len(grid.levels) < ENOUGH_LEVELS:
        return len(groups), int(dead.sum()), 0
    ends = (groups == grid.levels.argmin()) | (groups == grid.levels.argmax())
    saturated = ~dead & (2 * ends.sum(axis=1) > groups.shape[1])
    return len(groups), int(dead.sum()), int(saturated.sum())
