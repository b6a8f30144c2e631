"""Grid: the arithmetic that every scalar weight format shares.

    w ≈ scale * levels[code] + offset          scale and offset shared by a group of neighbouring weights

int8, ternary, q4_0, q4_k, iq4_nl, nf4, GPTQ, AWQ and HQQ differ in `levels`, in the group, and in how a file
stores scale and offset. Many store them in two steps, small integers times a unit that several groups share
(the k-quants, double quantization):

    scale  = unit[group // per_unit]        * steps[group]
    offset = offset_unit[group // per_unit] * offset_steps[group]

A Grid keeps that factored form, because a kernel streams the small integers and an encoder searches on them.
"""

from typing import Any, NamedTuple

import numpy as np


class Grid(NamedTuple):
    """The values that the codes of a matrix can stand for.

    Attributes
    ----------
    levels : int8 or float32 (n_levels,): the value of each code, before scale and offset.
    scale : float (rows, groups), or (rows, units) when `scale_steps` is given.
    offset : like `scale`, or None when the format has no offset.
    scale_steps : int8 or uint8 (rows, groups) or None: integer multiples of the unit in `scale`.
    offset_steps : uint8 (rows, groups) or None: integer multiples of the unit in `offset`.
    """

    levels: np.ndarray
    scale: np.ndarray
    offset: Any = None
    scale_steps: Any = None
    offset_steps: Any = None


def expand(unit: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    """Scale (or offset) of every group as float32 (rows, groups), from its stored form."""
    unit = unit.astype(np.float32)
    if steps is None:
        return unit
    return np.repeat(unit, steps.shape[1] // unit.shape[1], axis=1) * steps.astype(np.float32)


def decode(codes: np.ndarray, grid: Grid | None) -> np.ndarray:
    """Weights float32 (rows, cols) of codes uint8 (rows, cols); the values of a float format are their own
    codes.
    """
    if grid is None:
        return codes.astype(np.float32)
    rows, cols = codes.shape
    scale = expand(grid.scale, grid.scale_steps)[:, :, None]
    w = grid.levels.astype(np.float32)[codes].reshape(rows, scale.shape[1], -1)
    w *= scale
    if grid.offset is not None:
        w += expand(grid.offset, grid.offset_steps)[:, :, None]
    return w.reshape(rows, cols)


def inverse(x: np.ndarray) -> np.ndarray:
    """1 / x as float32, and 0 where x is 0, or so small that float32 does not hold it."""
    with np.errstate(divide="ignore", over="ignore"):
        out = np.float32(1) / np.asarray(x, np.float32)
    return np.where(np.isinf(out), np.float32(0), out)


def nearest(v: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Codes uint8 of the levels nearest to v; of two that are equally near, a table's is the one nearer to
    zero.
    """
    table = levels.astype(np.float32)
    if (np.diff(table) == 1).all():
        return (np.clip(np.rint(v), table[0], table[-1]) - table[0]).astype(np.uint8)
    ordered, codes = np.unique(table, return_index=True)
    place = np.zeros(v.shape, np.uint8)
    for middle in (ordered[1:] + ordered[:-1]) / 2:
        place += v >= middle if middle < 0 else v > middle
    return codes.astype(np.uint8)[place]


def encode(w: np.ndarray, grid: Grid | None) -> np.ndarray:
    """Codes uint8 (rows, cols) of the values nearest to w float32 (rows, cols); float formats have no grid,
    and w is its own codes.
    """
    if grid is None:
        return w
    rows, cols = w.shape
    scale = expand(grid.scale, grid.scale_steps)[:, :, None]
    x = w.reshape(rows, scale.shape[1], -1)
    if grid.offset is not None:
        x = x - expand(grid.offset, grid.offset_steps)[:, :, None]
    return nearest(x * inverse(scale), grid.levels).reshape(rows, cols)
