"""HQQ, half-quadratic quantization: choose offsets so that few weights are far off, without any data.

    minimize Σ |W - Ŵ|^p        p < 1,  Ŵ = scale * q + offset,  q the nearest levels

Such a sum lets a few weights be wrong if the others are right, and has no slope to follow. So part of the
error is put into a variable W_e, and the rest of it made small, ever more strictly, the two in turn:

    W_e    = shrink(W - Ŵ)        shrink(x) = sign(x) max(|x| - |x|^(p - 1) / β, 0)        (sub-problem 1)
    offset = mean over the group of (W - W_e - scale * q)                                  (sub-problem 2)
    β      = κ β

Of all offsets each group keeps the one with the least sum, as the file can store it, so that no round makes
anything worse. Scales stay those that cover all values.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023
(mobiusml.github.io/hqq_blog). There a grid has a zero point, which is -offset / scale, and rounds end when
the mean of all |W - Ŵ| rises.

Left out: quantized zero points and scales, which the authors' code has no more.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .. import formats, search, uniform
from ..grid import Grid, encode, inverse, nearest
from ..search import Space

Store = Callable[[np.ndarray], np.ndarray]


class Solver(NamedTuple):
    """How the offsets are sought: the exponent p, β, what β grows by, and rounds; the authors' values."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20


AUTHORS = Solver()


def hqq(
    w: np.ndarray, *, bits: int = 4, group: int = 64, axis: int = 1, solver: Solver = AUTHORS
) -> tuple[np.ndarray, Grid]:
    """Codes uint8 (n, group) and grid of n groups with float32 scales and offsets, as in HQQ's checkpoints.

    Parameters
    ----------
    w : float32 (rows, cols).
    bits : of a code, 1 to 8.
    group : weights that share scale and offset; must divide their number.
    axis : 1 for groups of neighbors in a row; 0 for weights that lie w.size / group from one to the next.
    solver : how the offsets are sought.
    """
    x = grouped(_finite(w), group, axis)
    levels = np.arange(2**bits, dtype=np.int16)
    low, high = x.min(axis=1), x.max(axis=1)
    scale = (high - low) / np.float32(levels[-1])
    offset = solve(x, scale, low, levels, 1, lambda offset: offset, solver)
    grid = Grid(levels, scale[:, None], offset[:, None])
    return encode(x, grid), grid


def grouped(w: np.ndarray, group: int, axis: int) -> np.ndarray:
    """A matrix's weights (n, group)."""
    if w.size % group or axis not in (0, 1):
        raise ValueError(f"{w.size} weights are no whole groups of {group} along axis {axis}")
    return w.reshape(-1, group) if axis else np.ascontiguousarray(w.reshape(group, -1).T)


def ungrouped(x: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The inverse of `grouped`."""
    return (x if axis else x.T).reshape(shape)


def has_offsets(format: str) -> bool:
    """Whether a type's grids have offsets, which are all that HQQ chooses."""
    module = formats.get(format)
    if kind := getattr(module, "KIND", None):
        return not kind.symmetric
    space: Space | None = getattr(module, "SPACE", None)
    return space is not None and space.offset


def hqq_onto(format: str, w: np.ndarray, *, solver: Solver = AUTHORS) -> tuple[np.ndarray, Grid]:
    """Codes uint8 (rows, cols) and grid of weights float32 (rows, cols), in a type that has offsets."""
    if not has_offsets(format):
        raise ValueError(f"{format} has no offsets, which are all that HQQ chooses")
    module = formats.get(format)
    formats.row_bytes(format, w.shape[1])
    if formats.parts(module):
        return _integers(module.KIND, _finite(w), solver)
    space = module.SPACE
    x, groups = w.reshape(-1, space.group), module.BLOCK // space.group
    formats.checked(module, w)
    low, high = x.min(axis=1), x.max(axis=1)
    if space.steps is None:
        scale, store = search.half((high - low) / np.float32(space.levels[-1])), search.half
        offset = solve(x, scale, low, space.levels, groups, store, solver)
        found = [scale, offset, scale, offset]
    else:
        last = space.steps[1]
        low = np.minimum(low, 0)
        unit, s = _steps((high - low) / np.float32(space.levels[-1]), groups, last)

        def stepped(offset: np.ndarray) -> np.ndarray:
            unit, m = _steps(-offset, groups, last)
            return -(unit * m)

        offset = solve(x, unit * s, low, space.levels, groups, stepped, solver)
        offset_unit, m = _steps(-offset, groups, last)
        found = [unit, offset_unit, s, m]
    grid = formats.of_rows(search.grid_of([v.reshape(-1, groups) for v in found], space), len(w))
    assert grid is not None
    return encode(w, grid), grid


def _integers(kind: uniform.Kind, w: np.ndarray, solver: Solver) -> tuple[np.ndarray, Grid]:
    """Codes uint8 (rows, cols) and grid of weights float32 (rows, cols), whose zero points are float16."""
    group = kind.group or w.shape[1]
    first = uniform.covering(w, kind.bits, group)
    scale, offset = first.scale.astype(np.float32).reshape(-1), first.offset.reshape(-1)
    shift = 128 if kind.bits == 8 else 0  # of signed levels

    def stored(offset: np.ndarray) -> np.ndarray:
        return scale * (shift - search.half(shift - offset / scale))

    best = solve(w.reshape(-1, group), scale, offset, first.levels, 1, stored, solver)
    grid = first._replace(offset=best.reshape(first.scale.shape))
    return encode(w, grid), grid


def _steps(v: np.ndarray, groups: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit, the largest of a block on the last step, and steps, float32 (n,) each."""
    unit = search.half(search.share(np.maximum(v, 0), groups, np.maximum) / np.float32(last))
    return unit, np.clip(np.rint(v * inverse(unit)), 0, last)


def solve(
    x: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    levels: np.ndarray,
    groups: int,
    store: Store,
    solver: Solver,
) -> np.ndarray:
    """The best offsets found, as stored, float32 (n,).

    x float32 (n, group); scale, offset float32 (n,), to begin with; `store` makes of offsets those that a
    file can hold, in blocks of so many groups, which are kept or not together.
    """
    over, beta, q_levels = inverse(scale)[:, None], solver.beta, levels.astype(np.float32)
    best, kept = np.full(len(x) // groups, np.inf), store(offset)
    for _ in range(solver.rounds + 1):
        stored = store(offset)
        q = q_levels[nearest((x - stored[:, None]) * over, q_levels)] * scale[:, None]
        left = x - (q + stored[:, None])
        size = np.abs(left)
        power = size**solver.p
        total = power.sum(axis=1, dtype=np.float64).reshape(-1, groups).sum(axis=1)
        kept = np.where(np.repeat(total < best, groups), stored, kept)
        best = np.minimum(best, total)
        with np.errstate(divide="ignore", invalid="ignore"):
            shrunk = np.maximum(size - np.where(size > 0, power / (size * np.float32(beta)), 0), 0)
        offset = (x - np.copysign(shrunk, left) - q).mean(axis=1)
        beta *= solver.kappa
    return kept


def _finite(w: np.ndarray) -> np.ndarray:
    if not np.isfinite(w).all():
        raise ValueError("weights that are no finite numbers")
    return np.ascontiguousarray(w, np.float32)
