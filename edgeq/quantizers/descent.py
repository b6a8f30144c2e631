"""Coordinate descent: go over codes and scales again, each chosen anew while all others stay.

    f(Ŵ) = ‖(W - Ŵ)X‖² = tr((W - Ŵ) H (W - Ŵ)ᵀ)        slope S = (Ŵ - W) H

    code of column j:       ŵ_j = the nearest value on the grid to ŵ_j - S_j / H_jj
    scale s, offset o:      with levels q, ŵ = s q + o in a group: the lowest point of f in s and o,
                            if the nearest that the file can store is lower than what was there

Each step is the least that f can be in what it changes, so f never rises, and what GPTQ began, which looks at
every column once and only ahead, ends in a place where no single code can be better.

Source: Behdin et al., QuantEase, arXiv 2309.01885, for the codes. It keeps scales as they are; their least
squares are those of `search.py`, with all of H in the place of its diagonal.

Left out: outliers that are kept as floats, which plain files have no place for.
"""

import importlib
from typing import Any

import numpy as np

from .. import formats
from ..grid import Grid, expand, inverse, nearest
from .target import Columns, Target

SINGULAR = 1e-6  # relative determinant below which codes do not tell scale and offset apart


def descend(
    w: np.ndarray, h: np.ndarray, codes: np.ndarray, grid: Grid, target: Target, sweeps: int
) -> tuple[np.ndarray, Grid]:
    """Codes uint8 (rows, cols) and grid that are no worse than the given ones.

    Parameters
    ----------
    w : float32 (rows, cols).
    h : float64 (cols, cols), with its damping.
    codes, grid : to begin with.
    target : the grids.
    sweeps : times that all columns are gone over.
    """
    cols = w.shape[1]
    now, stored = np.ascontiguousarray(codes.T), _Stored(grid, target)
    h32 = h.astype(np.float32)
    for _ in range(sweeps):
        columns = Columns(stored.grid(), cols)
        before = columns.values(now)
        slope = h32 @ (before - w.T)
        for g, start in enumerate(range(0, cols, columns.group)):
            here = slice(start, start + columns.group)
            own = np.ascontiguousarray(h32[here, here])
            q = now[here]
            moved = round_group(slope[here].copy(), own, columns, g, q, compiled=target.compiled)
            local = slope[here] + own @ moved
            moved += stored.refit(g, columns.levels[q], local, own)
            slope += h32[:, here] @ moved
    return np.ascontiguousarray(now.T), stored.grid()


def round_group(
    slope: np.ndarray, h: np.ndarray, columns: Columns, group: int, codes: np.ndarray, *, compiled: bool
) -> np.ndarray:
    """Choose the codes uint8 (n, rows) of a group anew, in their place; what that adds to the weights.

    That is float32 (n, rows), as slope, which is used up; h float32 (n, n).
    """
    scale, over, offset = columns.scale[group], columns.over[group], columns.offset[group]
    moves = np.empty(codes.shape, np.float32)
    if compiled and columns.ascending:
        kernels = importlib.import_module("edgeq.kernels.feedback")
        kernels.descend(slope, h, scale, over, offset, kernels.table(columns.levels), codes, moves)
        return moves
    for j in range(len(codes)):
        value = columns.levels[codes[j]] * scale + offset
        down = np.float32(1) / h[j, j]
        codes[j] = nearest((value - slope[j] * down - offset) * over, columns.levels)
        moves[j] = columns.levels[codes[j]] * scale + offset - value
        slope += np.outer(h[j], moves[j])
    return moves


class _Stored:
    """A grid's scales and offsets as they change, float32 (groups, rows), always such as a file can hold."""

    def __init__(self, grid: Grid, target: Target) -> None:
        module = formats.get(target.format)
        self.first: Grid = grid
        self.space: Any = getattr(module, "SPACE", None)
        self.free = self.space is not None or bool(formats.parts(module))
        self.scale = expand(grid.scale, grid.scale_steps).T.copy()
        self.offset = np.zeros_like(self.scale)
        if grid.offset is not None:
            self.offset = expand(grid.offset, grid.offset_steps).T.copy()
        # zero points are whole numbers and stay: the offset is a multiple of the scale
        self.zero = np.rint(self.offset * inverse(self.scale)) if self.space is None else None

    def refit(self, g: int, q: np.ndarray, slope: np.ndarray, h: np.ndarray) -> np.ndarray:
        """Choose scale and offset of group g anew; what that adds to the weights, float32 (n, rows). q, slope
        float32 (n, rows), levels and slope of the group; h float32 (n, n).
        """
        if not self.free:
            return np.zeros_like(q)
        s, o, h = self.scale[g], self.offset[g], h.astype(np.float64)
        q = (q if self.zero is None else q + self.zero[g]).astype(np.float64)
        hq, h1 = h @ q, h.sum(axis=1)
        qq, q1, one = (q * hq).sum(axis=0), h1 @ q, h1.sum()
        down, down1 = -(q * slope).sum(axis=0), -slope.sum(axis=0, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.first.offset is None or self.zero is not None:
                ds, do = down / qq, np.zeros(len(s))
            else:
                determinant = qq * one - q1 * q1
                ds = (one * down - q1 * down1) / determinant
                do = (qq * down1 - q1 * down) / determinant
                told_apart = determinant > SINGULAR * qq * one
                ds, do = np.where(told_apart, ds, 0), np.where(told_apart, do, down1 / one)
        new = self._nearest("scale", g, s + np.nan_to_num(ds))
        ds = new.astype(np.float64) - s
        if self.zero is not None:
            new_o, do = new * self.zero[g], np.zeros(len(s))
        else:
            new_o = self._nearest("offset", g, o + np.nan_to_num(do))
            do = new_o.astype(np.float64) - o
        gain = 2 * (ds * down + do * down1) - (ds * ds * qq + 2 * ds * do * q1 + do * do * one)
        better = (gain > 0) & (new * s > 0)
        self.scale[g], self.offset[g] = np.where(better, new, s), np.where(better, new_o, o)
        return np.where(better, ds * q + do, 0).astype(np.float32)

    def _nearest(self, what: str, g: int, value: np.ndarray) -> np.ndarray:
        """The nearest that a file can hold, float32 (rows,)."""
        unit, steps = getattr(self.first, what), getattr(self.first, f"{what}_steps")
        if unit is None:
            return np.zeros(len(value), np.float32)
        if steps is None:
            return value.astype(unit.dtype).astype(np.float32)
        first, last = self.space.steps
        unit = unit[:, g * unit.shape[1] // steps.shape[1]].astype(np.float32)
        least = first if what == "scale" else 0
        return unit * np.clip(np.rint(value * inverse(unit)), least, last).astype(np.float32)

    def grid(self) -> Grid:
        """As it is now."""
        made = self.first
        for what, now in (("scale", self.scale.T), ("offset", self.offset.T)):
            unit, steps = getattr(made, what), getattr(made, f"{what}_steps")
            if unit is None:
                continue
            if steps is None:
                made = made._replace(**{what: np.ascontiguousarray(now).astype(unit.dtype)})
            else:
                over = np.repeat(inverse(unit.astype(np.float32)), steps.shape[1] // unit.shape[1], axis=1)
                made = made._replace(**{f"{what}_steps": np.rint(now * over).astype(steps.dtype)})
        return made
