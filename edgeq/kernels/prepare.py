"""Preparing lanes, compiled: one kernel for all formats that have a wiring (see wiring.py). Its specification
is `lanes.prepare`.

The others are unpacked by NumPy, and only their codes go through the kernel. Where memory is mapped from a
file, it is given back on the way, so that a matrix is never there twice.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .. import formats
from ..tensor import Tensor
from . import lanes, pool, simd, wiring
from .jit import kernel
from .lanes import ROWS, RUN, Lanes
from .simd import I32, I64, _constant, _data, _splat, _store, _tile
from .wiring import Wiring

WORDS = simd.Tile("i32", 1)
UNIT_BYTES = 1 << 17  # of records that a thread makes at a time
STEP_BYTES = 1 << 23  # of the file that are in memory at once
FLOATS_AT_ONCE = 64  # columns of a matrix of floats that a wiring describes, if they divide it


@intrinsic
def splat(typing, value):
    """The word, an int64, in all sixteen rows."""

    def code(context, builder, sig, args):
        return _tile(builder, [_splat(builder, builder.trunc(args[0], I32))])

    return WORDS(types.int64), code


@intrinsic
def gather(typing, rows, at, stride):
    """Four bytes of each of sixteen rows, which are `stride` bytes apart, from byte `at` of the first."""

    def code(context, builder, sig, args):
        rows_, at_, stride_ = args
        vector, wide = WORDS.vector, ir.VectorType(I64, ROWS)
        start = builder.ptrtoint(builder.gep(_data(context, builder, rows, rows_), [at_]), I64)
        apart = builder.mul(_splat(builder, stride_), ir.Constant(wide, list(range(ROWS))))
        places = builder.inttoptr(
            builder.add(_splat(builder, start), apart), ir.VectorType(I32.as_pointer(), ROWS)
        )
        all_rows = _constant(ir.VectorType(ir.IntType(1), ROWS), 1)
        kind = ir.FunctionType(vector, [places.type, I32, all_rows.type, vector])
        load = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.gather.v16i32.v16p0")
        words = builder.call(load, [places, I32(1), all_rows, ir.Constant(vector, ir.Undefined)])
        return _tile(builder, [words])

    return WORDS(rows, types.int64, types.int64), code


@intrinsic
def add_piece(typing, word, source, right, left, mask):
    """word ^ (source >> right << left & mask)."""

    def code(context, builder, sig, args):
        word_, source_ = (builder.extract_value(a, 0) for a in args[:2])
        right_, left_, mask_ = (_splat(builder, builder.trunc(a, I32)) for a in args[2:])
        piece = builder.and_(builder.shl(builder.lshr(source_, right_), left_), mask_)
        return _tile(builder, [builder.xor(word_, piece)])

    return word(word, source, types.int64, types.int64, types.int64), code


def make_put(size):
    """A function that stores sixteen words of `size` bytes in a row."""

    @intrinsic
    def put(typing, out, at, words):
        def code(context, builder, sig, args):
            vector = builder.extract_value(args[2], 0)
            if size < 4:
                vector = builder.trunc(vector, ir.VectorType(ir.IntType(8 * size), ROWS))
            _store(builder, _data(context, builder, out, args[0]), args[1], vector)
            return context.get_dummy_value()

        return types.void(out, types.int64, words), code

    return put


put_1, put_2, put_4 = (make_put(size) for size in (1, 2, 4))


@njit(nogil=True)
def rewire_unit(unit, units, rows, source, target, words, pieces, out):
    """The sixteens of a unit."""
    stride, width = rows.shape[1], out.shape[1]
    for group in range(len(out) * unit // units, len(out) * (unit + 1) // units):
        for share in range(stride // source):
            start, to = group * ROWS * stride + share * source, group * width + share * target
            for w in range(len(words)):
                word = taken = splat(words[w, 2])
                last = -1
                for p in range(words[w, 3], words[w, 4]):
                    if pieces[p, 0] != last:
                        last = pieces[p, 0]
                        taken = gather(rows, start + last, stride)
                    word = add_piece(word, taken, pieces[p, 1], pieces[p, 2], pieces[p, 3])
                if words[w, 1] == 4:
                    put_4(out, to + words[w, 0], word)
                elif words[w, 1] == 2:
                    put_2(out, to + words[w, 0], word)
                else:
                    put_1(out, to + words[w, 0], word)


@kernel("void(i8[::1], u1[:, ::1], i8, i8, i8[:, ::1], i8[:, ::1], u1[:, ::1])")
def rewire(state, rows, source, target, words, pieces, out):
    """Move bits of rows (16 n, bytes) to records (n, bytes) as a Wiring of these numbers says."""
    units = max(1, min(len(out), out.nbytes // UNIT_BYTES))
    pool.run(state, units, pool.job(rewire_unit, (units, rows, source, target, words, pieces, out)))


def move_bits(rows: np.ndarray, wired: Wiring, data: np.ndarray) -> None:
    """Call `rewire`: rows uint8 (16 n, bytes), data (n, ...) of records or floats."""
    rewire(pool.state(), rows, *wired, data.view(np.uint8).reshape(len(data), -1))


def prepare(tensors: Sequence[Tensor], release: Callable[[np.ndarray], None] = lambda data: None) -> Lanes:
    """Lanes of the stacked rows of tensors that share format and columns (one tensor, or row counts in
    sixteens). `release` is called with bytes that are not needed any more.
    """
    made = lanes.room(tensors)
    wired = None if tensors[0].parts else format_wiring(tensors[0].format, tensors[0].cols)
    if wired is None:
        for at, panel in lanes.panels(tensors):
            fill(made.data[at : at + panel.rows // ROWS], panel)
        for t in tensors:
            release(t.data)
        return made
    at = 0
    for t in tensors:
        rows = t.data.reshape(t.rows, -1)
        step = max(STEP_BYTES // rows.shape[1] // ROWS, 1) * ROWS
        for start in range(0, t.rows, step):
            part = rows[start : start + step]
            whole = lanes.padded(part, ROWS)
            move_bits(whole, wired, made.data[at : at + len(whole) // ROWS])
            at += len(whole) // ROWS
            release(part)
    return made


def fill(data: np.ndarray, panel: Tensor) -> None:
    """`lanes.fill`, with the codes moved by the kernel."""
    if data.dtype.names is None:
        lanes.fill(data, panel)
        return
    codes, grid = formats.unpack(panel)
    codes = lanes.padded(codes, RUN, axis=1)
    wired = code_wiring(data.dtype, codes.shape[1] // data.shape[1])
    move_bits(codes, wired, data)
    lanes.fill_grid(data, lanes.integral(grid))


@cache
def format_wiring(name: str, cols: int) -> Wiring | None:
    """From rows of a format to records, or to floats; None for a format that does more than move bits."""

    def tensor(rows: np.ndarray, cols: int) -> Tensor:
        return Tensor(name, name, (len(rows), cols), rows.reshape(-1))

    if name in lanes.FLOATS:
        columns = math.gcd(cols, FLOATS_AT_ONCE)
        record = np.dtype([("w", lanes.FLOATS[name], (columns, ROWS))])
    else:
        example = lanes.room([tensor(np.zeros((1, formats.row_bytes(name, cols)), np.uint8), cols)]).data
        columns = max(cols // example.shape[1], formats.get(name).BLOCK)
        record = example.dtype

    def convert(rows: np.ndarray) -> np.ndarray:
        data = lanes.prepare([tensor(rows, columns)]).data
        return data.reshape(len(data), -1).view(record)

    return found(convert, formats.row_bytes(name, columns), record)


@cache
def code_wiring(record: np.dtype, columns: int) -> Wiring:
    """From unpacked codes to the planes of a record."""

    def convert(codes: np.ndarray) -> np.ndarray:
        data = np.zeros((len(codes) // ROWS, 1), record)
        lanes.fill_codes(data, codes)
        return data

    wired = found(convert, columns, record)
    assert wired
    return wired


def found(convert: Callable[[np.ndarray], np.ndarray], source: int, record: np.dtype) -> Wiring | None:
    """The wiring that `wiring.find` suggests, if it does what `convert` does."""
    wired = wiring.find(convert, source, record)
    if wired is not None:
        trial = np.random.default_rng(0).integers(0, 256, (4 * ROWS, source), np.uint8)
        want = convert(trial)
        got = np.empty_like(want)
        move_bits(trial, wired, got)
        if got.tobytes() == want.tobytes():
            return wired
    return None
