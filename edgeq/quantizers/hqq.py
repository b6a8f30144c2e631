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

import importlib
from typing import NamedTuple

import numpy as np

from .. import formats, search, uniform
from ..grid import Grid, encode, inverse
from ..powers import power
from ..search import Space

TINY = np.finfo(np.float32).tiny


class Solver(NamedTuple):
    """How the offsets are sought: the exponent p, β, what β grows by, and rounds; the authors' values."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20


AUTHORS = Solver()


class Store(NamedTuple):
    """Which offsets a file can hold.

    Attributes
    ----------
    kind : "free", all; "half", float16; "steps", of a unit that a block shares; "zero", float16 zero points.
    groups : of a block.
    last : step.
    """

    kind: str = "free"
    groups: int = 1
    last: int = 0


def hqq(
    w: np.ndarray,
    *,
    bits: int = 4,
    group: int = 64,
    axis: int = 1,
    solver: Solver = AUTHORS,
    compiled: bool = True,
) -> tuple[np.ndarray, Grid]:
    """Codes uint8 (n, group) and grid of n groups with float32 scales and offsets, as in HQQ's checkpoints.

    Parameters
    ----------
    w : float32 (rows, cols).
    bits : of a code, 1 to 8.
    group : weights that share scale and offset; must divide their number.
    axis : 1 for groups of neighbors in a row; 0 for weights that lie w.size / group from one to the next.
    solver : how the offsets are sought.
    compiled : by Numba's kernel, which finds the same.
    """
    x = grouped(_finite(w), group, axis)
    levels = np.arange(2**bits, dtype=np.int16)
    low, high = x.min(axis=1), x.max(axis=1)
    scale = (high - low) / np.float32(levels[-1])
    offset = solve(x, scale, low, levels, Store(), solver, compiled=compiled)
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


def hqq_onto(
    format: str, w: np.ndarray, *, solver: Solver = AUTHORS, compiled: bool = True
) -> tuple[np.ndarray, Grid]:
    """Codes uint8 (rows, cols) and grid of weights float32 (rows, cols), in a type that has offsets."""
    if not has_offsets(format):
        raise ValueError(f"{format} has no offsets, which are all that HQQ chooses")
    module = formats.get(format)
    formats.row_bytes(format, w.shape[1])
    if formats.parts(module):
        return _integers(module.KIND, _finite(w), solver, compiled)
    space = module.SPACE
    x, groups = w.reshape(-1, space.group), module.BLOCK // space.group
    formats.checked(module, w)
    low, high = x.min(axis=1), x.max(axis=1)
    if space.steps is None:
        scale, store = search.half((high - low) / np.float32(space.levels[-1])), Store("half", groups)
        offset = solve(x, scale, low, space.levels, store, solver, compiled=compiled)
        found = [scale, offset, scale, offset]
    else:
        last = space.steps[1]
        low = np.minimum(low, 0)
        unit, s = _steps((high - low) / np.float32(space.levels[-1]), groups, last)
        store = Store("steps", groups, last)
        offset = solve(x, unit * s, low, space.levels, store, solver, compiled=compiled)
        offset_unit, m = _steps(-offset, groups, last)
        found = [unit, offset_unit, s, m]
    grid = formats.of_rows(search.grid_of([v.reshape(-1, groups) for v in found], space), len(w))
    assert grid is not None
    return _codes(w, grid, compiled), grid


def _integers(kind: uniform.Kind, w: np.ndarray, solver: Solver, compiled: bool) -> tuple[np.ndarray, Grid]:
    """Codes uint8 (rows, cols) and grid of weights float32 (rows, cols), whose zero points are float16."""
    group = kind.group or w.shape[1]
    first = uniform.covering(w, kind.bits, group)
    scale, offset = first.scale.astype(np.float32).reshape(-1), first.offset.reshape(-1)
    x, store = w.reshape(-1, group), Store("zero")
    best = solve(x, scale, offset, first.levels, store, solver, compiled=compiled)
    grid = first._replace(offset=best.reshape(first.scale.shape))
    return _codes(w, grid, compiled), grid


def _codes(w: np.ndarray, grid: Grid, compiled: bool) -> np.ndarray:
    return importlib.import_module("edgeq.kernels.encode").encode(w, grid) if compiled else encode(w, grid)


def _steps(v: np.ndarray, groups: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit, the largest of a block on the last step, and steps, float32 (n,) each."""
    unit = search.half(search.share(np.maximum(v, 0), groups, np.maximum) / np.float32(last))
    return unit, np.clip(np.rint(v * inverse(unit)), 0, last)


def solve(
    x: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    levels: np.ndarray,
    store: Store,
    solver: Solver,
    *,
    compiled: bool = True,
) -> np.ndarray:
    """The best offsets found, as stored, float32 (n,).

    x float32 (n, group); scale, offset float32 (n,), to begin with; levels follow each other. The offsets of
    a block are kept or not together. compiled : by the kernel, which finds the same.
    """
    if not 0 < solver.p < 1:
        raise ValueError(f"p = {solver.p:g}, expected a number between 0 and 1")
    betas = np.array([solver.beta * solver.kappa**i for i in range(solver.rounds + 1)], np.float32)
    first, last = int(levels[0]), int(levels[-1])
    if compiled:
        kernel = importlib.import_module("edgeq.kernels.halfquadratic").solve
        return kernel(x, scale, offset, (first, last), store, solver.p, betas)
    x, over = np.ascontiguousarray(x.T), inverse(scale)
    best, kept = np.full(len(scale), np.inf, np.float32), offset
    for beta in betas:
        now = stored(offset, scale, first, store)
        q = np.clip(np.rint((x - now) * over), first, last) * scale
        left = x - (q + now)
        size = np.abs(left)
        many = power(size, solver.p)
        lost = search.share(search.total(many), store.groups, np.add)
        kept, best = np.where(lost < best, now, kept), np.minimum(lost, best)
        with np.errstate(over="ignore"):
            limit = many / (np.maximum(size, TINY) * beta)
        noise = left - np.maximum(np.minimum(left, limit), -limit)
        # with 0, a sum of -0 is 0
        offset = (search.total(x - noise - q) + np.float32(0)) / np.float32(len(x))
    return kept


def stored(offset: np.ndarray, scale: np.ndarray, first: int, store: Store) -> np.ndarray:
    """The nearest offsets float32 (n,) that a file can hold; `first` is the first level."""
    match store.kind:
        case "half":
            return search.half(offset)
        case "steps":
            unit, m = _steps(-offset, store.groups, store.last)
            return 0 - unit * m
        case "zero":
            return scale * (-first - search.half(-first - offset / scale))
    return offset


def _finite(w: np.ndarray) -> np.ndarray:
    if not np.isfinite(w).all():
        raise ValueError("weights that are no finite numbers")
    return np.ascontiguousarray(w, np.float32)
