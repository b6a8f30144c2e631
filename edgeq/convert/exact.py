"""Integers whose scales are apart, in the types of GGUF files: the same numbers, wherever there are such.

    w = scale * v,  v = code - zero        is in      if all v are
    tq2_0    d * v    d float16            2.06 bits  -1 …   1
    q4_0                                   4.5         -8 …   7
    q5_0                                   5.5        -16 …  15
    q8_0                                   8.5       -128 … 127

    w = scale * code + offset              is in
    q4_1     d * code + m                  5           codes to 15, d and m float16

So 4 bits with zero points, of which v is -15 … 15, are q5_0: in q4_1 the offset, scale * zero, has more
bits than float16. A group of more columns than a block is several blocks with its scale. What no type holds
is a scale that is no float16, or a zero point that is no integer: the nearest is then off by 2^-11 of the
scale or of the offset.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .. import formats
from ..errors import EdgeqError
from ..grid import Grid, decode
from ..tensor import Tensor

INTEGERS = ("binary", "i1", "i2", "i3", "i4", "i8", "ternary")
PANEL = 1 << 22  # weights at a time
TYPES = ("tq2_0", "q4_0", "q4_1", "q5_0", "q8_0")


class Held(NamedTuple):
    """A tensor in a type of GGUF's, and the largest error, as a share of the largest weight."""

    tensor: Tensor
    error: float


def hold(tensor: Tensor) -> Held:
    """The smallest tensor that holds just these weights, or else that which comes nearest."""
    if tensor.format not in INTEGERS or tensor.order is not None:
        what = tensor.format if tensor.order is None else "groups that are no neighbors"
        raise EdgeqError(
            f"tensor {tensor.name}: GGUF files have no type for {what}. "
            "Take f32 or f16, or quantize anew (--allow-requantize)"
        )
    best = None
    for name in TYPES:
        if tensor.cols % formats.get(name).BLOCK or not _groups_fit(tensor, name):
            continue
        held = _in(name, tensor)
        if held is None:
            continue
        if not held.error:
            return held
        if best is None or held.error < best.error:
            best = held
    if best is None:
        raise EdgeqError(
            f"tensor {tensor.name}: GGUF files have no type for {tensor.format} in {tensor.cols} columns and "
            "such groups. Take f32 or f16"
        )
    return best


def reason(tensor: Tensor) -> str:
    """Which bits are lost."""
    scale = tensor.parts["scale"].astype(np.float32)
    with np.errstate(over="ignore"):
        short = scale.astype(np.float16).astype(np.float32)
    if (lost := short != scale).any():
        return f"scales such as {scale[lost][0]:.9g}, for which float16 has {short[lost][0]:.9g}"
    return "offsets of more bits than float16 has"


def _groups_fit(tensor: Tensor, name: str) -> bool:
    """Whether each block lies in a group."""
    scale = tensor.parts["scale"]
    group = tensor.cols // (scale.shape[1] if scale.ndim > 1 else 1)
    return group % formats.get(name).BLOCK == 0


def _in(name: str, tensor: Tensor) -> Held | None:
    """The tensor in a type, None where its codes do not fit."""
    made, worst, largest = [], 0.0, 0.0
    for codes, grid in _panels(tensor):
        moved = _moved(name, codes, grid, tensor)
        if moved is None:
            return None
        w, ours = decode(codes, grid), decode(*moved)
        worst = max(worst, float(np.abs(w - ours).max(initial=0)))
        largest = max(largest, float(np.abs(w).max(initial=0)))
        made.append(formats.pack(name, *moved).data)
    data = np.concatenate(made)
    return Held(Tensor(tensor.name, name, tensor.shape, data), worst / (largest or 1))


def _panels(tensor: Tensor) -> Iterator[tuple[np.ndarray, Grid]]:
    step = max(1, PANEL // tensor.cols)
    for start in range(0, tensor.rows, step):
        codes, grid = formats.unpack(tensor, start, min(start + step, tensor.rows))
        assert grid is not None
        yield codes, grid


def _moved(name: str, codes: np.ndarray, grid: Grid, tensor: Tensor) -> tuple[np.ndarray, Grid] | None:
    """The codes and the grid of some rows in a type."""
    module = formats.get(name)
    blocks = tensor.cols // module.BLOCK
    scale, offset = grid.scale.astype(np.float32), grid.offset
    if name == "q4_1":
        if offset is None or grid.levels[0] != 0 or len(grid.levels) > 16:
            return None
        return codes, Grid(module.LEVELS, _half(scale, blocks), _half(offset, blocks))
    v = grid.levels.astype(np.int16)[codes]
    if tensor.format == "binary":
        v, scale = 2 * v - 1, -offset
    elif offset is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = np.where(scale != 0, offset / scale, 0)
        whole = np.rint(shift)
        if (np.abs(shift - whole) > 1e-4).any():  # float32 rounded the offset
            return None
        v += np.repeat(whole.astype(np.int16), tensor.cols // scale.shape[1], axis=1)
    low, high = (-1, 1) if name == "tq2_0" else (module.LEVELS[0], module.LEVELS[-1])
    if v.min() < low or v.max() > high:
        return None
    return (v - module.LEVELS[0].astype(np.int16)).astype(np.uint8), Grid(module.LEVELS, _half(scale, blocks))


def _half(values: np.ndarray, blocks: int) -> np.ndarray:
    """float16 (rows, blocks), one of a group for each of its blocks."""
    with np.errstate(over="ignore"):
        return np.repeat(values.astype(np.float16), blocks // values.shape[1], axis=1)
