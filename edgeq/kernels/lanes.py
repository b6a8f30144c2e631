"""Lanes: weights prepared for the kernels. Formats are many, lanes are few, and the kernels know only lanes.

Sixteen rows are interleaved, four columns a row, so that one 32-bit vector lane is one output row: no sum
ever runs across lanes, sixteen scales are one load, and a matrix is one linear stream. A run of 32 columns is
eight quads:

    quad k    64 bytes: columns 4k..4k+3 of row 0, then of row 1, … row 15

Codes are kept in planes of 8, 4, 2 and 1 bits; 5-bit codes are a plane of 4 and one of 1. A byte of a plane
holds the codes of several quads, so that a shift and a mask make an operand of the integer dot product:

    p8    512 bytes a run    quad k
    p4    256 bytes          quad k in the low four bits, quad k + 4 in the high ones
    p2    128 bytes          quads k, k + 2, k + 4, k + 6
    p1     64 bytes          quads 0 … 7
    t4    256 bytes          as p4, but a code is looked up in a table of sixteen bytes

A matrix is an array (rows / 16, cols / columns of a record) of records, and the record is a NumPy structured
type whose fields say which planes there are, so that the type alone tells a kernel (and its compiler)
everything:

    scale          (groups, 16)    f16, f32, or small integers that `unit` multiplies
    unit           (16,)           f16, when scales are integers
    offset         (groups, 16)    likewise, for formats with an offset
    offset_unit    (16,)
    p8 p4 p2 p1 t4 (runs, bytes)

    w = scale * (code - zero) + offset         scale and offset times their units; zero: one for the matrix

Float weights need none of this: an array (rows / 16, cols, 16) of f32, f16 or bf16 (as u16).
"""

import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .. import formats
from ..grid import Grid
from ..tensor import Tensor

ROWS, RUN, QUADS = 16, 32, 8
# bytes of a run; low bits of a code go to the largest plane, where half of them lie in place
PLANE_BYTES = {"p8": 512, "t4": 256, "p4": 256, "p2": 128, "p1": 64}
FLOATS = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}
PANEL = 256  # rows unpacked together while preparing: bounds the scratch memory


class Lanes(NamedTuple):
    """A prepared matrix.

    Attributes
    ----------
    rows, cols : its shape before padding.
    data : array of records, or of floats, as the module describes.
    table : uint8 (16,): levels biased by 128, for t4.
    zero : the code that stands for zero, before the offset.
    """

    rows: int
    cols: int
    data: np.ndarray
    table: np.ndarray
    zero: int

    @property
    def is_float(self) -> bool:
        """Whether the weights are floats rather than codes."""
        return self.data.dtype.names is None


def planes(levels: np.ndarray) -> tuple[str, ...]:
    """The planes that hold codes for these levels: the fewest bits when levels are evenly spaced, else a
    table.
    """
    if (np.diff(levels.astype(np.float32)) != 1).any():
        if len(levels) > 16 or levels.dtype != np.int8:
            raise ValueError(f"{len(levels)} levels of {levels.dtype}; a table holds at most 16 of int8")
        return ("t4",)
    bits = int(len(levels) - 1).bit_length()
    if bits > 6:
        return ("p8",)
    return tuple(f"p{b}" for b in (4, 2, 1) if bits & b)


def integral(grid: Grid) -> Grid:
    """The grid with levels that a table holds: those that are no integers are rounded, to steps of 1/112 of
    the largest, with which NF4's come out best: 0.0017 of it off, root mean square.
    """
    if grid.levels.dtype == np.int8:
        return grid
    step = np.abs(grid.levels).max() / np.float32(112)
    return grid._replace(levels=np.rint(grid.levels / step).astype(np.int8), scale=grid.scale * step)


def layout(grid: Grid, cols: int) -> tuple[np.dtype, int]:
    """The record type for rows of such a grid, and the columns of a record."""
    groups = (grid.scale if grid.scale_steps is None else grid.scale_steps).shape[1]
    group = cols // groups
    if grid.scale_steps is not None:
        columns = cols // grid.scale.shape[1]
    elif group < 64 and cols % 64 == 0:
        columns = 64  # two runs: the planes of most formats then start at a cache line
    else:
        columns = min(group, 256) if group % RUN == 0 and cols % min(group, 256) == 0 else RUN
    per_record = max(1, columns // group)
    if columns % RUN or (group < RUN and group != 16) or (group > RUN and group % RUN):
        raise ValueError(f"groups of {group} columns; lanes have groups of 16 or of a multiple of {RUN}")
    fields: list[tuple] = []
    for name, unit_name, unit, steps in (
        ("scale", "unit", grid.scale, grid.scale_steps),
        ("offset", "offset_unit", grid.offset, grid.offset_steps),
    ):
        if unit is None:
            continue
        if steps is not None:
            fields.append((unit_name, unit.dtype, ROWS))
        fields.append((name, unit.dtype if steps is None else steps.dtype, (per_record, ROWS)))
    fields += [(p, np.uint8, (columns // RUN, PLANE_BYTES[p])) for p in planes(grid.levels)]
    fields.sort(key=lambda f: -np.dtype(f[1]).itemsize * int(f[0] not in PLANE_BYTES))
    return np.dtype(fields), columns


def prepare(tensors: Sequence[Tensor]) -> Lanes:
    """Lanes of the stacked rows of tensors that share format and columns (one tensor, or row counts in
    sixteens): what `prepare.py` does faster.
    """
    made = room(tensors)
    for at, panel in panels(tensors):
        fill(made.data[at : at + panel.rows // ROWS], panel)
    return made


def room(tensors: Sequence[Tensor]) -> Lanes:
    """Lanes for such tensors, yet to be filled."""
    rows, cols = sum(t.rows for t in tensors), tensors[0].cols
    name, groups, table = tensors[0].format, -(-rows // ROWS), np.zeros(16, np.uint8)
    if name in FLOATS:
        return Lanes(rows, cols, MEMORY.take((groups, cols, ROWS), np.dtype(FLOATS[name])), table, 0)
    grid = integral(formats.unpack(tensors[0], 0, 1)[1])
    record, columns = layout(grid, -(-cols // RUN) * RUN)
    zero = -int(grid.levels[0])
    if "t4" in record.names:
        table[: len(grid.levels)] = grid.levels.view(np.uint8) ^ 128
        zero = 128
    if zero and grid.offset is not None:
        raise ValueError(f"{name} has an offset, so its levels must begin at 0")
    return Lanes(rows, cols, MEMORY.take((groups, -(-cols // columns)), record), table, zero)


class Memory:
    """Memory for matrices, cut from large blocks: the system gives a large block in huge pages, for which
    NumPy asks, and so three times as fast as many small ones.
    """

    BLOCK = 1 << 26

    def __init__(self) -> None:
        self.block, self.lock = np.empty(0, np.uint8), threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array, of any content, that starts at a cache line."""
        size = math.prod(shape) * dtype.itemsize
        with self.lock:
            start = -self.block.ctypes.data % 64
            if start + size > len(self.block):
                self.block = np.empty(max(size + 64, self.BLOCK), np.uint8)
                start = -self.block.ctypes.data % 64
            taken, self.block = self.block[start : start + size], self.block[start + size :]
        return taken.view(dtype).reshape(shape)


MEMORY = Memory()


def panels(tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(first sixteen of rows, some rows of a tensor), padded with rows of zeros, which all formats read as
    weights of 0.
    """
    at = 0
    for t in tensors:
        encoded = t.data.reshape(t.rows, -1)
        for start in range(0, t.rows, PANEL):
            data = padded(encoded[start : start + PANEL], ROWS)
            parts = {k: padded(v[start : start + PANEL], ROWS) for k, v in t.parts.items()}
            yield at, t._replace(shape=(len(data), t.cols), data=data.reshape(-1), parts=parts)
            at += len(data) // ROWS


def padded(array: np.ndarray, multiple: int, axis: int = 0) -> np.ndarray:
    """The array, with zeros at the end of an axis to make its length a multiple of a number."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    return np.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])


def fill(data: np.ndarray, panel: Tensor) -> None:
    """Write a panel into records (n / 16, records), or floats (n / 16, cols, 16)."""
    if data.dtype.names is None:
        data[:] = panel.data.view(data.dtype).reshape(-1, ROWS, panel.cols).swapaxes(1, 2)
    else:
        codes, grid = formats.unpack(panel)
        fill_grid(data, integral(grid))
        fill_codes(data, codes)


def fill_grid(data: np.ndarray, grid: Grid) -> None:
    """Write scales and offsets of a grid of n rows into records (n / 16, records)."""
    groups, records = data.shape
    for name, field in data.dtype.fields.items():
        if name in PLANE_BYTES:
            continue
        source = {
            "scale": grid.scale if grid.scale_steps is None else grid.scale_steps,
            "offset": grid.offset if grid.offset_steps is None else grid.offset_steps,
            "unit": grid.scale,
            "offset_unit": grid.offset,
        }[name]
        if source.shape[1] < records:  # one scale for several records
            source = np.repeat(source, records // source.shape[1], axis=1)
        source = source.reshape(groups, ROWS, records, -1).transpose(0, 2, 3, 1)
        data[name] = source.reshape(groups, records, *field[0].shape)


def fill_codes(data: np.ndarray, codes: np.ndarray) -> None:
    """Write codes (n, cols) into the planes of records (n / 16, records)."""
    groups, records = data.shape
    codes = padded(codes, RUN, axis=1)  # these columns meet activations of 0
    runs = codes.shape[1] // RUN
    # the four columns of a quad move together, as one 32-bit number: (groups, runs, quads, rows)
    quads = codes.view(np.uint32).reshape(groups, ROWS, runs, QUADS).transpose(0, 2, 3, 1)
    quads = np.ascontiguousarray(quads).view(np.uint8).reshape(groups, runs, QUADS, 64)
    shift = 0
    for name in PLANE_BYTES:
        if name not in data.dtype.names:
            continue
        bits = int(name[1])
        per_byte = 8 // bits
        part = (quads >> shift) & ((1 << bits) - 1) if bits < 8 else quads
        shift += bits
        part = part.reshape(groups, runs, per_byte, QUADS // per_byte, 64)
        plane = part[:, :, 0]
        for i in range(1, per_byte):
            plane = plane | (part[:, :, i] << (i * bits))
        data[name] = plane.reshape(groups, records, -1, PLANE_BYTES[name])


def decode(lanes: Lanes) -> np.ndarray:
    """Weights float32 (rows, cols) of prepared lanes: what the kernels compute with."""
    data = lanes.data
    if lanes.is_float:
        w = data.swapaxes(1, 2).reshape(-1, lanes.cols)
        w = (w.astype(np.uint32) << 16).view(np.float32) if w.dtype == np.uint16 else w.astype(np.float32)
        return w[: lanes.rows]
    groups, records = data.shape
    codes = np.zeros((groups, 1, QUADS, 64), np.uint8)
    shift = 0
    for name in PLANE_BYTES:
        if name not in data.dtype.names:
            continue
        bits = int(name[1])
        plane = data[name].reshape(groups, -1, 1, PLANE_BYTES[name] // 64, 64)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None, None]
        part = ((plane >> shifts) & (255 >> (8 - bits))).reshape(groups, -1, QUADS, 64)
        codes = codes | (part << shift)
        shift += bits
    if "t4" in data.dtype.names:
        codes = lanes.table[codes]
    codes = (
        codes.reshape(groups, -1, QUADS, ROWS, 4).transpose(0, 3, 1, 2, 4).reshape(groups * ROWS, records, -1)
    )
    w = codes.astype(np.float32) - np.float32(lanes.zero)
    parts = []
    for name, unit in (("scale", "unit"), ("offset", "offset_unit")):
        if name in data.dtype.names:
            part = data[name].astype(np.float32)
            if unit in data.dtype.names:
                part = part * data[unit].astype(np.float32)[:, :, None]
            parts.append(part.transpose(0, 3, 1, 2).reshape(groups * ROWS, records, -1, 1))
    w = w.reshape(groups * ROWS, records, parts[0].shape[2], -1) * parts[0]
    if len(parts) > 1:
        w = w + parts[1]
    return w.reshape(groups * ROWS, -1)[: lanes.rows, : lanes.cols]
