"""Uniform grids of 1, 2, 3, 4 and 8 bits, whose scales are kept apart from the codes: what i1 … i8 share.

    symmetric      w = scale * q              q = -2**(bits - 1) … 2**(bits - 1) - 1
    asymmetric     w = scale * (q - zero)     q = 0 … 2**bits - 1, and the zero point is one of them

with a scale for the matrix, for each row (a channel of the output), or for each group of columns.

    scale   float (rows,) or (rows, groups)
    zero    uint8, likewise, where the grid is asymmetric; float16 where it is no code, as HQQ has it

Names say which of these grids are meant: ``"i4"`` has a scale for each row, ``"i4-g64"`` for each 64 columns
of it, ``"i4-g64-asym"`` zero points, too.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from .grid import Grid, inverse
from .ranges import Choice, grid_parameters, minmax, mse

LARGEST = float(np.finfo(np.float16).max)
FARTHEST = 2.0**15  # a zero point that is no code; float16 has room beyond


class Kind(NamedTuple):
    """What a name says: bits of a code, columns that share a scale (None: all), and no zero points."""

    bits: int
    group: int | None
    symmetric: bool

    @property
    def format(self) -> str:
        """Its codes' module in `formats`."""
        return f"i{self.bits}"

    @property
    def options(self) -> dict[str, Any]:
        """Those of `fit`."""
        return {"per": self.group or "row", "symmetric": self.symmetric}


def kind(name: str) -> Kind | None:
    """What the name of such a grid says; None for another name, ValueError for groups that nothing runs."""
    match = re.fullmatch(r"i([12348])(?:-g(\d+))?(-asym)?", name)
    if match is None:
        return None
    group = int(match[2]) if match[2] else None
    if group is not None and group != 16 and (group == 0 or group % 32):
        raise ValueError(f"{name}: groups of {group} columns, expected 16 or a multiple of 32")
    return Kind(int(match[1]), group, match[3] is None)


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
    per : what shares a scale: ``"tensor"``, ``"row"``, or that many columns of a row, whose scales are then
        float16, as all files with groups can hold them.
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
    return grid_of(bits, scale if isinstance(per, str) else _half(scale), None if symmetric else zero)


def covering(w: np.ndarray, bits: int, group: int) -> Grid:
    """Grid of w float32 (rows, cols) that covers all values of each group from its least on, with zero points
    that are float16 and no codes.
    """
    x = w.reshape(len(w), -1, group)
    low, high = x.min(axis=2), x.max(axis=2)
    # of weights that are nearly alike: their value from the zero point, which must not become too large
    step = np.maximum((high - low) / np.float32(2**bits - 1), np.abs(low) / np.float32(FARTHEST))
    scale = _half(step)
    scale = np.where(scale > 0, scale, np.float16(1))
    return grid_of(bits, scale, (-low / scale.astype(np.float32)).astype(np.float16))


def _half(scale: np.ndarray) -> np.ndarray:
    """float16 of scales; ValueError where they are too large."""
    if not (scale <= LARGEST).all():  # or one is NaN
        raise ValueError(f"weights that need a scale of {scale.max():g}; float16 holds {LARGEST:g} at most")
    return scale.astype(np.float16)


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
    whole = np.rint(zero)
    if (grid_of(bits, grid.scale, whole).offset == grid.offset).all():
        return {"scale": grid.scale, "zero": whole.astype(np.uint8)}
    return {"scale": grid.scale, "zero": zero.astype(np.float16)}
