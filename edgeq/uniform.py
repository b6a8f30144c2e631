"""Uniform grids of 2, 3, 4 and 8 bits, whose scales are kept apart from the codes: what i2, i3, i4, i8 share.

    symmetric      w = scale * q              q = -2**(bits - 1) … 2**(bits - 1) - 1
    asymmetric     w = scale * (q - zero)     q = 0 … 2**bits - 1, and the zero point is one of them

with a scale for the matrix, for each row (a channel of the output), or for each group of columns.

    scale   float (rows,) or (rows, groups)
    zero    uint8, likewise, where the grid is asymmetric
"""

import numpy as np

from .grid import Grid, inverse
from .ranges import Choice, grid_parameters, minmax, mse


def fit(
    w: np.ndarray,
    bits: int,
    importance: np.ndarray | None = None,
    *,
    symmetric: bool = True,
    per: int | str = "row",
    choose: Choice | None = None,
) -> Grid:
    """Grid of w.

    Parameters
    ----------
    w : float32 (rows, cols).
    bits : of a code.
    importance : float32, as w, or None.
    symmetric : no zero point.
    per : what shares a scale: ``"tensor"``, ``"row"``, or that many columns of a row.
    choose : a function of `ranges`; `functools.partial` sets its options. By default all values are covered,
        or, given their importance, as many as have the least weighted squared error.
    """
    rows, cols = w.shape
    group = cols if isinstance(per, str) else per
    if cols % group:
        raise ValueError(f"{cols} columns are no whole groups of {group}")
    size = w.size if per == "tensor" else group
    choose = choose or (minmax if importance is None else mse)
    weight = None if importance is None else importance.reshape(-1, size)
    scale, zero = grid_parameters(*choose(w.reshape(-1, size), bits, symmetric, weight), bits, symmetric)
    shape = rows, cols // group
    scale, zero = (np.broadcast_to(v.reshape(-1, shape[1]), shape).copy() for v in (scale, zero))
    return grid_of(bits, scale, None if symmetric else zero)


def grid_of(bits: int, scale: np.ndarray, zero: np.ndarray | None) -> Grid:
    """Grid with these scales and zero points (rows,) or (rows, groups)."""
    scale = scale.reshape(len(scale), -1)
    signed = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.int8)
    if zero is None:
        return Grid(signed, scale)
    zero = zero.reshape(scale.shape).astype(np.float32)
    if bits == 8:  # levels to 255 are no int8
        return Grid(signed, scale, scale * (128 - zero))
    return Grid(np.arange(2**bits, dtype=np.int8), scale, -scale * zero)


def parts(grid: Grid, bits: int) -> dict[str, np.ndarray]:
    """What is kept apart from the codes."""
    if grid.offset is None:
        return {"scale": grid.scale}
    zero = -grid.offset * inverse(grid.scale) + (128 if bits == 8 else 0)
    return {"scale": grid.scale, "zero": np.rint(zero).astype(np.uint8)}
