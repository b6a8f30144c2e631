"""Target: the grids that an algorithm is to put weights on, of a GGUF type or of integers with groups.

An algorithm chooses codes, and perhaps changes weights before a group of them gets its grid. Which grids
there are, and how one is fit to weights, is the format's business.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import formats, uniform
from ..grid import Grid, expand, inverse, nearest

Fit = Callable[[np.ndarray, np.ndarray | None], Grid]


class Target(NamedTuple):
    """A family of grids.

    Attributes
    ----------
    format : in whose files they are stored.
    width : columns of a row whose grid is fit at once.
    fit : (w float32 (rows, n * width), importance (n * width,) or None) -> Grid, as the file can store it.
    compiled : whether Numba's kernels compute, where there are any.
    by_rows : whether each row has grids of its own.
    """

    format: str
    width: int
    fit: Fit
    compiled: bool = True
    by_rows: bool = True


def target(format: str, cols: int, *, compiled: bool = True, **options: Any) -> Target:
    """The grids of a format for a matrix of so many columns.

    compiled : with Numba's kernels, where there are any; the grids are the same.
    options : those of the format's own `fit`, such as ``per`` and ``symmetric`` of the integers.
    """
    module = formats.get(format)
    formats.row_bytes(format, cols)
    if module.BLOCK == 1 and not formats.parts(module):
        raise ValueError(f"{format} has no grid that weights could be put on")
    if formats.parts(module):
        kind = uniform.kind(format)
        per = options.get("per", kind.group or "row" if kind else "row")
        if cols % (width := cols if isinstance(per, str) else per):
            raise ValueError(f"{cols} columns are no whole groups of {width}")
        weighted = {}
        if compiled and kind and per != "tensor":
            weighted["choose"] = importlib.import_module("edgeq.kernels.ranges").mse
        fit = partial(_fit_apart, module.fit, options, weighted | options)
        return Target(format, width, fit, compiled, per != "tensor")
    if compiled and hasattr(module, "SPACE") and not options:
        kernel = importlib.import_module("edgeq.kernels.encode").fit
        return Target(format, module.BLOCK, partial(kernel, module))
    return Target(format, module.BLOCK, partial(_fit, format, options), compiled)


def _fit(format: str, options: dict, w: np.ndarray, importance: np.ndarray | None) -> Grid:
    grid = formats.fit(format, w, importance, **options)
    assert grid is not None
    return grid


def _fit_apart(
    fit: Callable, options: dict, weighted: dict, w: np.ndarray, importance: np.ndarray | None
) -> Grid:
    if importance is None:
        return fit(w, **options)
    return fit(w, np.broadcast_to(importance, w.shape), **weighted)


class Columns:
    """A grid, column by column.

    grid : of (rows, groups), for so many columns.
    """

    def __init__(self, grid: Grid, cols: int) -> None:
        scale = expand(grid.scale, grid.scale_steps).T
        self.levels, self.group = grid.levels.astype(np.float32), cols // len(scale)
        self.scale, self.over = np.ascontiguousarray(scale), inverse(np.ascontiguousarray(scale))
        self.ascending = bool((np.diff(self.levels) > 0).all())  # as kernels want them
        self.offset = np.zeros_like(self.scale)
        if grid.offset is not None:
            self.offset = np.ascontiguousarray(expand(grid.offset, grid.offset_steps).T)

    def round(self, column: int, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes uint8 of weights float32 (rows,) in that column, and the float32 that each stands for."""
        g = column // self.group
        codes = nearest((w - self.offset[g]) * self.over[g], self.levels)
        return codes, self.levels[codes] * self.scale[g] + self.offset[g]

    def values(self, codes: np.ndarray) -> np.ndarray:
        """What codes uint8 (cols, rows) stand for, float32."""
        w = self.levels[codes].reshape(len(self.scale), self.group, -1)
        return (w * self.scale[:, None] + self.offset[:, None]).reshape(codes.shape)


def join(grids: Sequence[Grid], axis: int = 1) -> Grid:
    """The grid of columns side by side, or of rows one below the other (axis 0)."""
    first = grids[0]._asdict()
    arrays = {
        key: np.concatenate([getattr(g, key) for g in grids], axis=axis)
        for key, value in first.items()
        if key != "levels" and value is not None
    }
    return grids[0]._replace(**arrays)
