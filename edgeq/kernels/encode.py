"""Encoding compiled, bit for bit: `formats.quantize` with the nearest codes of `grid.encode` and the plain
roundings of `rounding.py`; scales are searched in `kernels/search.py`.
"""

from types import ModuleType

import numpy as np
from numba import njit

from .. import formats, rounding
from ..grid import Grid, expand
from ..tensor import Tensor
from . import simd
from .jit import kernel
from .search import fit as search_fit
from .search import table
from .simd import LANES

FARTHEST, MINMAX, ABSMAX = range(3)
BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))  # so that 0.49999997 does not become 1
HOW = {rounding.farthest: FARTHEST, rounding.minmax: MINMAX, rounding.absmax: ABSMAX}


def quantize(name: str, w: np.ndarray, importance: np.ndarray | None = None) -> Tensor:
    """`formats.quantize`, compiled, on the thread that calls it; several may."""
    return formats.quantize(name, w, importance, choose=choose)


def choose(
    module: ModuleType, w: np.ndarray, importance: np.ndarray | None
) -> tuple[np.ndarray, Grid | None]:
    """`formats.choose`"""
    space = getattr(module, "SPACE", None)
    if space is None:
        return formats.choose(module, w, importance)
    w = formats.checked(module, floats(w))
    blocks = w.reshape(-1, module.BLOCK)
    if importance is None and space.rounding:
        codes = np.empty(blocks.shape, np.uint8)
        scale, offset = np.empty((2, len(blocks), 1), np.float32)
        round_blocks(blocks, HOW[space.rounding], table(space.levels), codes, scale[:, 0], offset[:, 0])
        return codes, Grid(space.levels, scale.astype("<f2"), offset.astype("<f2") if space.offset else None)
    grid = search_fit(w, importance, space, module.BLOCK)
    return encode(blocks, grid), grid


def fit(module: ModuleType, w: np.ndarray, importance: np.ndarray | None) -> Grid:
    """`formats.fit` of rows w (rows, cols), importance (cols,), for a format with a SPACE."""
    if importance is None and module.SPACE.rounding:
        grid = choose(module, w, None)[1]
    else:
        grid = search_fit(formats.checked(module, floats(w)), importance, module.SPACE, module.BLOCK)
    return formats.of_rows(grid, len(w))


def encode(w: np.ndarray, grid: Grid) -> np.ndarray:
    """`grid.encode`, for levels in ascending order; w float32 (rows, cols)."""
    scale, offset = _flat(grid)
    codes = np.empty((scale.size, w.size // scale.size), np.uint8)
    encode_groups(w.reshape(codes.shape), scale, offset, table(grid.levels), codes)
    return codes.reshape(w.shape)


def rounded(w: np.ndarray, grid: Grid) -> np.ndarray:
    """`grid.decode` of `grid.encode`, for levels in ascending order; w float32 (rows, cols)."""
    scale, offset = _flat(grid)
    out = np.empty((scale.size, w.size // scale.size), np.float32)
    round_groups(w.reshape(out.shape), scale, offset, table(grid.levels), out)
    return out.reshape(w.shape)


def _flat(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of each group, float32."""
    scale = expand(grid.scale, grid.scale_steps).reshape(-1)
    if grid.offset is None:
        return scale, np.zeros_like(scale)
    return scale, expand(grid.offset, grid.offset_steps).reshape(-1)


def floats(w: np.ndarray) -> np.ndarray:
    """w as float32, contiguous."""
    if w.dtype != np.float16 or w.size % LANES:
        return np.ascontiguousarray(w, np.float32)
    out = np.empty(w.shape, np.float32)
    widen(np.ascontiguousarray(w).view(np.int16).reshape(-1), out.reshape(-1))
    return out


@kernel("void(i2[::1], f4[::1])")
def widen(halves, out):
    """out = float16 numbers, which come as int16; a multiple of sixteen."""
    for i in range(0, len(out), LANES):
        simd.store(out, i, 0, simd.load(halves, i))


@njit(nogil=True, error_model="numpy")
def inverse(scale):
    """`grid.inverse` of a number."""
    over = np.float32(1) / scale
    return np.float32(0) if np.isinf(over) else over


@njit(nogil=True)
def place(v, levels):
    """The code of the level nearest to v, of levels that are no neighbouring integers."""
    code = 0
    for i in range(levels.shape[1] - 1):
        code += v > levels[1, i]
    return code


@kernel("void(f4[:, ::1], f4[::1], f4[::1], f4[:, ::1], u1[:, ::1])", error_model="numpy")
def encode_groups(w, scale, offset, levels, codes):
    """codes u8 (groups, group) = nearest to w, on the grid of scale and offset f32 (groups,) and of levels as
    `table` has them.
    """
    first, last = levels[0, 0], levels[0, -1]
    for g in range(len(w)):
        over = inverse(scale[g])
        for j in range(w.shape[1]):
            v = (w[g, j] - offset[g]) * over
            if levels.shape[1] == 2:
                codes[g, j] = np.uint8(min(max(np.rint(v), first), last) - first)
            else:
                codes[g, j] = np.uint8(place(v, levels))


@kernel("void(f4[:, ::1], f4[::1], f4[::1], f4[:, ::1], f4[:, ::1])", error_model="numpy")
def round_groups(w, scale, offset, levels, out):
    """out f32 (groups, group) = what the codes of `encode_groups` stand for."""
    first, last = levels[0, 0], levels[0, -1]
    for g in range(len(w)):
        over = inverse(scale[g])
        if levels.shape[1] == 2:
            for j in range(w.shape[1]):
                v = min(max(np.rint((w[g, j] - offset[g]) * over), first), last)
                out[g, j] = v * scale[g] + offset[g]
        else:
            for j in range(w.shape[1]):
                code = place((w[g, j] - offset[g]) * over, levels)
                out[g, j] = levels[0, code] * scale[g] + offset[g]


@njit(nogil=True, fastmath={"nnan", "nsz"})
def ends(w, n):
    """The lowest and the highest number of row n."""
    low, high = w[n, 0], w[n, 0]
    for j in range(w.shape[1]):
        low, high = min(low, w[n, j]), max(high, w[n, j])
    return low, high


@kernel("void(f4[:, ::1], i8, f4[:, ::1], u1[:, ::1], f4[::1], f4[::1])", error_model="numpy")
def round_blocks(w, how, levels, codes, scales, offsets):
    """`rounding.farthest`, `minmax` or `absmax` of the blocks w f32 (n, block)."""
    zero, first, last = np.float32(0), levels[0, 0], levels[0, 1]
    bias, top, block = np.float32(0.5) - first, last - first, w.shape[1]
    for n in range(len(w)):
        low, high = ends(w, n)
        offset = zero
        if how == MINMAX:
            offset = low + zero
            scale = (high + zero - offset) / last
        elif how == ABSMAX:
            scale = abs(max(high, -low)) / last
        else:
            extreme = high if high > -low else low
            if high == -low:
                for j in range(block):
                    if abs(w[n, j]) == high:
                        extreme = w[n, j]
                        break
            scale = extreme / first
        over = np.float32(1) / scale
        over = zero if np.isinf(over) else over
        scales[n], offsets[n] = scale, offset
        if how == ABSMAX:
            for j in range(block):
                v = w[n, j] * over
                codes[n, j] = np.uint8(np.trunc(v + np.copysign(BELOW_HALF, v)) - first)
        else:
            for j in range(block):
                codes[n, j] = np.uint8(min(np.floor((w[n, j] - offset) * over + bias), top))
