"""Search: the scales and offsets with the least weighted squared error among those that a file can store.

    error = Σ importance * (w - scale * level - offset)²        the level nearest to w, for each weight

With the importance of a column its mean squared input, this is what the columns add to the squared error of
the layer's output, one by one. Without importance all columns count the same.

For given codes the error is a parabola in scale and offset, whose lowest point is two linear equations; for
given scale and offset the best codes are the nearest. Doing both in turn goes down to a valley, and which one
depends on where it began:

1. Each group by itself, from several scales that let the extreme weights lie somewhat outside the grid, or
   somewhat inside. The best is kept.
2. Where scales are integer steps of a unit, a block's groups together: the unit that puts the largest scale
   on the last step, and a few larger ones. Each group moves to the best of its neighboring steps, the units
   go to the lowest point for these codes, and again. The best is kept.

3. Least squares leaves a block smaller than it was: what it cannot tell from noise, it draws to zero. By
   that part the output of every layer shrinks, while the rest of the error is noise that averages out.
   Without importance, which says better what to keep, the units therefore grow until
   Σ w * (scale * level + offset) = Σ w², at the price of some error.

Arrays are laid out position first, float32 (group, groups): w[j] is weight j of every group. Sums run over j
in order, so that a kernel that has groups side by side gets the same bits; `kernels/encode.py` has it.

Sources: least squares for scale and offset as in Lloyd's algorithm (Least Squares Quantization in PCM, 1982);
the search from several ranges as in OCTAV and in ggml's encoders of the k-quants.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .grid import Grid, inverse, nearest

# The extreme weight starts on the extreme level, or this many spacings beyond or within; the first is what a
# group gets that has no importance at all.
STARTS = (0, -3, -2, -1, -0.5, 0.5, 1)
PASSES = 4  # least squares and nearest codes, from each start
UNITS = 4  # tried: the largest scale on the last step, the one before, …
ROUNDS = 2  # neighboring steps and least squares, for each unit
MOVES = (0, -1, 1)  # of a group's steps
SINGULAR = np.float32(1e-5)  # relative determinant below which codes do not tell scale and offset apart
LARGEST = np.float32(65504)  # of float16
FIRST = np.float32(0.5)  # the least level that the extreme weight may start at
GROWTH = np.float32(1.25)  # of units, at most


class Space(NamedTuple):
    """The grids that a format can store.

    Attributes
    ----------
    levels : int8 (n_levels,): as in Grid.
    group : weights that share scale and offset.
    steps : first and last integer that multiplies a block's unit, or None where a group has its own scale.
        Offsets are then the negatives of steps 0 … last, and scales and offsets do not change sign.
    offset : whether there is one.
    rounding : how ggml encodes without importance (`rounding.py`), or None where it searches, too.
    """

    levels: np.ndarray
    group: int
    steps: tuple[int, int] | None = None
    offset: bool = False
    rounding: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, Grid]] | None = None

    @property
    def reach(self) -> float:
        """The largest weight that float16 scales and offsets allow on both sides of zero."""
        first, *_, last = self.levels.astype(float)
        return (
            float(LARGEST) * (self.steps[1] if self.steps else 1) * (1 if self.offset else min(-first, last))
        )


class Sums(NamedTuple):
    """What least squares needs of a group's residuals r and levels q, weighted: float32 (groups,) each.

    Levels count from a center. From the level that stands for the mean weight, it matters little to float32
    that one column may be a million times as important as the others, which is common where a model has an
    attention sink.
    """

    error: np.ndarray  # Σ r²
    r: np.ndarray
    rq: np.ndarray
    q: np.ndarray
    qq: np.ndarray


def fit(w: np.ndarray, importance: np.ndarray | None, space: Space) -> Grid:
    """Grid of the blocks w float32 (n, block) whose float16 scales and steps are those of the file.

    importance : float32, as w, or None.
    """
    if importance is None and space.rounding:
        return space.rounding(w, space.levels)[1]
    x = position_first(w, space.group)
    weight = np.ones_like(x) if importance is None else position_first(importance, space.group)
    scale, offset = alone(x, weight, space)
    groups = w.shape[1] // space.group
    if space.steps is None:
        found = [half(scale), half(offset), scale, offset]
    else:
        found = together(x, weight, scale, offset, space, groups)
        if importance is None:
            found = grown(x, found, space, groups)
    return grid_of([v.reshape(-1, groups) for v in found], space)


def grid_of(found: Sequence[np.ndarray], space: Space) -> Grid:
    """Grid of what was found for each group, four of float32 (n, groups): scale and offset, or their units,
    and the steps of both.
    """
    # adding 0 makes minus zero, which depends on how the arithmetic was arranged, zero
    scale, offset, s, m = (v + np.float32(0) for v in found)
    if space.steps is None:
        return Grid(space.levels, scale.astype("<f2"), offset.astype("<f2") if space.offset else None)
    grid = Grid(space.levels, scale[:, :1].astype("<f2"))
    if not space.offset:
        return grid._replace(scale_steps=s.astype(np.int8))
    return grid._replace(
        offset=-offset[:, :1].astype("<f2"), scale_steps=s.astype(np.uint8), offset_steps=m.astype(np.uint8)
    )


def position_first(w: np.ndarray, group: int) -> np.ndarray:
    """float32 (n, block) -> (group, groups)."""
    return np.ascontiguousarray(w.reshape(-1, group).T, np.float32)


def total(terms: np.ndarray) -> np.ndarray:
    """Sum over positions, (group, groups) -> (groups,), one after the other."""
    out = terms[0].copy()
    for term in terms[1:]:
        out += term
    return out


def half(x: np.ndarray) -> np.ndarray:
    """The nearest float16, as float32."""
    return np.clip(x, -LARGEST, LARGEST).astype(np.float16).astype(np.float32)


def residuals(x: np.ndarray, scale: np.ndarray, offset: np.ndarray, levels: np.ndarray) -> tuple:
    """What the nearest levels leave of x, and the levels, both (group, groups)."""
    q = levels[nearest((x - offset) * inverse(scale), levels)].astype(np.float32)
    return x - (q * scale + offset), q


def measure(
    x: np.ndarray,
    weight: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    center: np.ndarray,
    levels: np.ndarray,
) -> Sums:
    """Error of a grid, and where it leads."""
    r, q = residuals(x, scale, offset, levels)
    q -= center
    wr, wq = weight * r, weight * q
    return Sums(total(wr * r), total(wr), total(wr * q), total(wq), total(wq * q))


def factors(space: Space) -> np.ndarray:
    """The scales to begin with, as multiples of a group's range, or of its extreme weight, float32 (n,)."""
    levels = space.levels.astype(np.float32)
    start = np.array(STARTS, np.float32)
    if space.offset:
        return 1 / np.maximum(levels[-1] + start, FIRST)
    ends = (levels[0], levels[1]), (levels[-1], levels[-2])
    return np.concatenate(
        [np.sign(end) / np.maximum(abs(end) + start * abs(end - inner), FIRST) for end, inner in ends]
    )


def alone(x: np.ndarray, weight: np.ndarray, space: Space) -> tuple[np.ndarray, np.ndarray]:
    """The best scale and offset found for each group, (groups,) each; offset 0 where there is none."""
    low, high = x.min(axis=0), x.max(axis=0)
    if space.offset:
        low = np.minimum(low, 0) if space.steps else low
        span, begin = high - low, low
    else:
        span, begin = np.where(high < -low, low, high), np.zeros_like(low)
    w = total(weight)
    mean, center = total(weight * x) * inverse(w), np.zeros_like(low)
    best, best_scale, best_offset = np.full_like(low, np.inf), begin, begin
    for factor in factors(space):
        scale, offset = span * factor, begin
        for _ in range(PASSES):
            if space.offset:
                _, center = residuals(mean, scale, offset, space.levels)
            sums = measure(x, weight, scale, offset, center, space.levels)
            better = sums.error < best
            best = np.where(better, sums.error, best)
            best_scale = np.where(better, scale, best_scale)
            best_offset = np.where(better, offset, best_offset)
            scale, offset = lowest(scale, offset, w, center, sums, space)
    return best_scale, best_offset


def lowest(
    scale: np.ndarray, offset: np.ndarray, w: np.ndarray, center: np.ndarray, sums: Sums, space: Space
) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the offset with the least error for the codes that were measured, (groups,) each."""
    _, r, rq, q, qq = sums
    if not space.offset:
        return scale + rq * inverse(qq), offset
    determinant = w * qq - q * q
    over = np.where(SINGULAR * (w * qq) < determinant, inverse(determinant), 0)
    more = (w * rq - q * r) * over
    new_scale = scale + more
    new_offset = offset + ((qq * r - q * rq) * over - more * center)
    if space.steps:
        # the best scale for offset 0, from sums over the levels themselves
        q0 = q + center * w
        qq0 = qq + center * (q + q0)
        at_zero = scale + (rq + center * r + offset * q0) * inverse(qq0)
        beyond = new_offset > 0
        new_scale, new_offset = np.where(beyond, at_zero, new_scale), np.where(beyond, 0, new_offset)
    # a scale that changes sign or vanishes has lost its way
    lost = new_scale <= 0
    return np.where(lost, scale, new_scale), np.where(lost, offset, new_offset)


def shares(space: Space) -> np.ndarray:
    """The units that are tried, as parts of the largest scale, float32 (n,)."""
    if not space.steps:
        return np.empty(0, np.float32)
    last = space.steps[1]
    return 1 / (np.float32(last) - np.arange(UNITS, dtype=np.float32))


def share(v: np.ndarray, groups: int, combine: np.ufunc) -> np.ndarray:
    """The sum or maximum over the groups of a block, given to each of them: (n * groups,), by halves."""
    block = v.reshape(-1, groups)
    while block.shape[1] > 1:
        block = combine(block[:, ::2], block[:, 1::2])
    return np.repeat(block, groups)


def together(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, offset: np.ndarray, space: Space, groups: int
) -> list[np.ndarray]:
    """Unit, offset unit, steps of each for the scales and offsets of blocks of so many groups; all
    (n * groups,).
    """
    first, last = space.steps or (0, 0)
    w = total(weight)
    largest = share(np.abs(scale), groups, np.maximum), share(-offset, groups, np.maximum)
    best, kept = np.full_like(scale, np.inf), [scale] * 4
    for part in shares(space):
        unit, offset_unit = (half(v * part) for v in largest)
        s = np.clip(np.rint(scale * inverse(unit)), first, last)
        m = np.clip(np.rint(-offset * inverse(offset_unit)), 0, last)
        for _ in range(ROUNDS):
            error, s, m = move(x, weight, unit, offset_unit, s, m, space)
            error = share(error, groups, np.add)
            better = error < best
            best = np.where(better, error, best)
            kept = [np.where(better, a, b) for a, b in zip((unit, offset_unit, s, m), kept, strict=True)]
            sums = measure(x, weight, unit * s, -(offset_unit * m), np.zeros_like(s), space.levels)
            unit, offset_unit = lowest_units(unit, offset_unit, s, m, w, sums, space, groups)
    return kept


def grown(x: np.ndarray, found: list[np.ndarray], space: Space, groups: int) -> list[np.ndarray]:
    """What `together` found, with units that leave blocks as large as they were."""
    unit, offset_unit, s, m = found
    r, _ = residuals(x, unit * s, -(offset_unit * m), space.levels)
    size = share(total(x * x), groups, np.add)
    left = size - share(total(x * r), groups, np.add)
    growth = np.minimum(np.maximum(size * inverse(left), 1), GROWTH)
    return [half(unit * growth), half(offset_unit * growth), s, m]


def move(
    x: np.ndarray,
    weight: np.ndarray,
    unit: np.ndarray,
    offset_unit: np.ndarray,
    s: np.ndarray,
    m: np.ndarray,
    space: Space,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best steps within one of s and m, (groups,) each: error, steps of the scale, of the offset."""
    first, last = space.steps or (0, 0)
    best, best_s, best_m = np.full_like(s, np.inf), s, m
    for ds in MOVES:
        for dm in MOVES if space.offset else MOVES[:1]:
            new_s, new_m = np.clip(s + ds, first, last), np.clip(m + dm, 0, last)
            r, _ = residuals(x, unit * new_s, -(offset_unit * new_m), space.levels)
            error = total(weight * r * r)
            better = error < best
            best = np.where(better, error, best)
            best_s, best_m = np.where(better, new_s, best_s), np.where(better, new_m, best_m)
    return best, best_s, best_m


def lowest_units(
    unit: np.ndarray,
    offset_unit: np.ndarray,
    s: np.ndarray,
    m: np.ndarray,
    w: np.ndarray,
    sums: Sums,
    space: Space,
    groups: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The units with the least error for the steps and codes that were measured, (n * groups,) each."""
    ss, sr = share(s * s * sums.qq, groups, np.add), share(s * sums.rq, groups, np.add)
    if not space.offset:
        return half(unit + sr * inverse(ss)), offset_unit
    sm, mm = share(s * m * sums.q, groups, np.add), share(m * m * w, groups, np.add)
    mr = share(m * sums.r, groups, np.add)
    determinant = ss * mm - sm * sm
    over = np.where(SINGULAR * (ss * mm) < determinant, inverse(determinant), 0)
    return half(unit + (mm * sr - sm * mr) * over), half(offset_unit + (sm * sr - ss * mr) * over)
