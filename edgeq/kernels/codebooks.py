"""y = x Wᵀ where groups of weights are sums of codebook rows (`formats/aqlm.py`), without making the weights.

An entry is what one codebook adds to one group of a row. Codes are laid out as the lanes are, sixteen rows
side by side:

    codes    (rows / 16, entries, 16)    u8, or u16 of codebooks with more than 8 bits

One token, codes of at most 8 bits: the products of the group's inputs with all rows of the codebook are made
once, and each output row adds up those that its codes name. A part of the tables at a time stays in the
nearest cache.

    table[entry, code] = C[code] · x of the entry's group
    y[row] = scale[row] * sum of table[entry, codes[row, entry]] over the entries

One token, codes of more bits: such tables would take longer than all else. The codebook's rows are fetched,
those of sixteen outputs at a time, and multiplied.

Many tokens: sixteen rows of weights are made, as floats, and all tokens meet them as in `matmul.many_float`.

Threads take the output rows in units, and no two write to the same place.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .. import formats
from ..tensor import Tensor
from . import elementwise, lanes, pool, scratch, simd
from .jit import kernel
from .lanes import ROWS
from .matmul import TOKENS, share, unit_count
from .simd import (
    F16,
    F32,
    I8,
    I32,
    I64,
    LANES,
    _constant,
    _data,
    _fma,
    _join,
    _load,
    _pieces,
    _shuffle,
    _splat,
    _store,
    _tile,
    _vectors,
    _widen,
)

EIGHT = 8
CACHED = 16  # entries whose tables are in the nearest cache at a time
FEW = 8  # tokens that are taken one by one
SPAN = 8  # vectors of a table that are made together
zero_span, zero_eight, zero_tokens = (simd.make_zero(n) for n in (SPAN, ROWS // 2, TOKENS))


class Prepared(NamedTuple):
    """A matrix in AQLM.

    Attributes
    ----------
    shape : before padding.
    codes : as the module describes, entries filled up to a multiple of CACHED.
    scale : float32 (rows filled up to sixteens,).
    columns : float32 (codebooks * group, size), the codebooks of up to 8 bits, a row for each input.
    books : float32, or float16 as int16, (parts, codebooks * size + 1, 8): all codebooks, eight columns a
        part, and a row of zeros.
    places : int64 (2, entries): of each entry the first input, and the first row in `books`.
    """

    shape: tuple[int, ...]
    codes: np.ndarray
    scale: np.ndarray
    columns: np.ndarray
    books: np.ndarray
    places: np.ndarray

    @property
    def direct(self) -> bool:
        """Whether rows of codebooks are fetched, and no tables are made."""
        return self.codes.itemsize > 1


def prepare(tensor: Tensor) -> Prepared:
    """A tensor in AQLM for the kernels, which trust that every code names a row."""
    module = formats.get("aqlm")
    codes, books = module.codes(tensor), tensor.parts["codebooks"]
    count, size, group = books.shape
    if codes.max(initial=0) >= size:
        raise ValueError(f"codes up to {codes.max()}, the codebooks have {size} rows")
    rows, groups, _ = codes.shape
    codes = lanes.padded(lanes.padded(codes.reshape(rows, -1), ROWS), CACHED, axis=1)
    entries = codes.shape[1]
    laid_out = lanes.MEMORY.take((len(codes) // ROWS, entries, ROWS), codes.dtype)
    laid_out[:] = codes.reshape(-1, ROWS, entries).swapaxes(1, 2)
    columns = books.astype(np.float32).swapaxes(1, 2).reshape(count * group, size)
    if codes.itemsize > 1:
        columns = columns[:0]  # nobody asks for them
    kind = np.float16 if simd.PATH.half and books.dtype == np.float16 else np.float32
    # entries that fill up name the row of zeros at the end
    wide = lanes.padded(books.reshape(-1, group).astype(kind), EIGHT, axis=1)
    wide = np.concatenate([wide, np.zeros_like(wide[:1])])
    entry = np.arange(entries)
    real = entry < groups * count
    first = np.where(real, entry % count * size, count * size)
    return Prepared(
        tensor.shape,
        laid_out,
        lanes.padded(tensor.parts["scale"].astype(np.float32), ROWS),
        np.ascontiguousarray(lanes.padded(columns, SPAN * LANES, axis=1)),
        simd.kernel_view(np.ascontiguousarray(wide.reshape(len(wide), -1, EIGHT).swapaxes(0, 1))),
        np.stack([np.where(real, entry // count * group, 0), first]),
    )


@intrinsic
def fetch(typing, table, start, codes, at):
    """table[start + code] for the sixteen codes from index `at` on."""

    def code(context, builder, sig, args):
        i32 = ir.VectorType(I32, LANES)
        start, at = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 3))
        index = builder.zext(
            _load(builder, _data(context, builder, codes, args[2]), at, ir.VectorType(I8, LANES)), i32
        )
        base = builder.ptrtoint(_data(context, builder, table, args[0]), I64)
        base = builder.add(base, builder.mul(start, I64(4)))
        wide = ir.VectorType(I64, LANES)
        places = builder.add(
            _splat(builder, base), builder.mul(builder.zext(index, wide), _constant(wide, 4))
        )
        f32 = ir.VectorType(F32, LANES)
        places = builder.inttoptr(places, ir.VectorType(F32.as_pointer(), LANES))
        every = _constant(ir.VectorType(ir.IntType(1), LANES), 1)
        kind = ir.FunctionType(f32, [places.type, I32, every.type, f32])
        gather = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.gather.v16f32.v16p0")
        return _tile(builder, [builder.call(gather, [places, I32(4), every, ir.Constant(f32, ir.Undefined)])])

    return simd.Tile("f32", 1)(table, start, codes, at), code


def _eight(builder, base, index, dtype):
    """Eight numbers of an array float32, or float16 as int16, as float32."""
    if dtype == types.int16:
        at = builder.mul(index, I64(2))
        return _widen(builder, _load(builder, base, at, ir.VectorType(F16, EIGHT)))
    return _load(builder, base, builder.mul(index, I64(4)), ir.VectorType(F32, EIGHT))


@intrinsic
def add_span(typing, acc, array, at, x):
    """acc + x * the elements of an array float32 from index `at` on, as many as acc has."""

    def code(context, builder, sig, args):
        base = _data(context, builder, array, args[1])
        start = builder.mul(context.cast(builder, args[2], sig.args[2], types.intp), I64(4))
        given, f32 = _splat(builder, args[3]), ir.VectorType(F32, LANES)
        out = [
            _fma(builder, v, _load(builder, base, builder.add(start, I64(4 * LANES * i)), f32), given)
            for i, v in enumerate(_vectors(builder, args[0]))
        ]
        return _tile(builder, out)

    return acc(acc, array, at, types.float32), code


@intrinsic
def add_products(typing, acc, books, first, codes, at, x, place):
    """acc + books[first + code] * x[place : place + 8] for the sixteen codes from index `at` on, two in each
    vector of acc. books (n, 8) float32, or float16 as int16.
    """

    def code(context, builder, sig, args):
        first, at, place = (context.cast(builder, args[n], sig.args[n], types.intp) for n in (2, 4, 6))
        base, names = _data(context, builder, books, args[1]), _data(context, builder, codes, args[3])
        given = _eight(builder, _data(context, builder, x, args[5]), place, x.dtype)
        given = _join(builder, [given, given])
        size = codes.dtype.bitwidth // 8

        def row(i):
            where = builder.mul(builder.add(at, I64(i)), I64(size))
            name = builder.zext(_load(builder, names, where, ir.IntType(8 * size)), I64)
            return _eight(builder, base, builder.mul(builder.add(first, name), I64(EIGHT)), books.dtype)

        out = [
            _fma(builder, v, _join(builder, [row(2 * i), row(2 * i + 1)]), given)
            for i, v in enumerate(_vectors(builder, args[0]))
        ]
        return _tile(builder, out)

    return acc(acc, books, first, codes, at, x, place), code


@intrinsic
def totals(typing, acc):
    """The sums of the halves of eight vectors, as a vector."""

    def code(context, builder, sig, args):
        halves = [half for v in _vectors(builder, args[0]) for half in _pieces(builder, v, 2)]
        for _ in range(3):  # sums of neighbors: those of the first half of a pair, then those of the other
            halves = [
                builder.fadd(*(_shuffle(builder, a, b, range(start, 16, 2)) for start in (0, 1)))
                for a, b in zip(halves[::2], halves[1::2], strict=True)
            ]
        return _tile(builder, [_join(builder, halves)])

    return simd.Tile("f32", 1)(acc), code


@intrinsic
def add_eight(typing, out, at, books, start):
    """out[at : at + 8] += books[start : start + 8]; out float32."""

    def code(context, builder, sig, args):
        at, start = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 3))
        base = _data(context, builder, out, args[0])
        row = _eight(builder, _data(context, builder, books, args[2]), start, books.dtype)
        _store(
            builder, base, builder.mul(at, I64(4)), builder.fadd(_eight(builder, base, at, out.dtype), row)
        )
        return context.get_dummy_value()

    return types.void(out, at, books, start), code


@njit(nogil=True)
def fill_tables(unit, units, columns, places, size, group, x, token, table):
    """The tables of a unit's entries, f32 (entries, size); padded entries stay zero."""
    first, stop = share(unit, units, table.shape[0])
    width = columns.shape[1]
    for e in range(first, stop):
        book = places[1, e] // size * group
        if book == columns.shape[0]:
            table[e] = 0
            continue
        for c in range(0, width, SPAN * LANES):
            acc = zero_span()
            for i in range(group):
                acc = add_span(acc, columns, (book + i) * width + c, x[token, places[0, e] + i])
            simd.store(table, e * width + c, LANES, acc)


@njit(nogil=True)
def add_tables(unit, units, codes, scale, table, out, token, column):
    """The rows of a unit, for one token."""
    first, stop = share(unit, units, codes.shape[0])
    entries, width = codes.shape[1], table.shape[1]
    for start in range(0, entries, CACHED):
        for g in range(first, stop):
            at = token * out.shape[1] + column + ROWS * g
            acc = simd.load(out, at) if start else simd.splat(np.float32(0))
            for e in range(start, start + CACHED):
                acc = simd.add(acc, fetch(table, e * width, codes, (g * entries + e) * ROWS))
            if start + CACHED == entries:
                acc = simd.mul(acc, simd.load(scale, ROWS * g))
            simd.store(out, at, 0, acc)


@kernel()
def by_tables(state, codes, scale, columns, places, size, group, x, token, table, out, column):
    """out[token, column:] = W x[token]; x and out f32, table f32 (entries, size) is for the tables."""
    units = min(codes.shape[1], 4 * state[pool.THREADS])
    job = pool.job(fill_tables, (units, columns, places, size, group, x, token, table))
    pool.run(state, units, job)
    units = unit_count(state, codes, codes.shape[0])
    pool.run(state, units, pool.job(add_tables, (units, codes, scale, table, out, token, column)))


@njit(nogil=True)
def add_rows(unit, units, codes, scale, books, places, x, out, token, column):
    """The rows of a unit, for one token."""
    first, stop = share(unit, units, codes.shape[0])
    parts, total = books.shape[:2]
    for g in range(first, stop):
        acc = zero_eight()
        for e in range(codes.shape[1]):
            at = (g * codes.shape[1] + e) * ROWS
            for i in range(parts):
                acc = add_products(
                    acc, books, i * total + places[1, e], codes, at, x, places[0, e] + EIGHT * i
                )
        y = simd.mul(totals(acc), simd.load(scale, ROWS * g))
        simd.store(out, token * out.shape[1] + column + ROWS * g, 0, y)


@kernel()
def by_rows(state, codes, scale, books, places, x, token, padded, out, column):
    """out[token, column:] = W x[token]; padded f32 (1, cols + 8 * parts), whose end is zeros."""
    for i in range(x.shape[1]):
        padded[0, i] = x[token, i]
    units = unit_count(state, codes, codes.shape[0])
    pool.run(
        state, units, pool.job(add_rows, (units, codes, scale, books, places, padded, out, token, column))
    )


@njit(nogil=True)
def multiply_unit(unit, units, codes, scale, books, places, x, rows, panel, out, column):
    """The rows of a unit, for all tokens."""
    first, stop = share(unit, units, codes.shape[0])
    cols, stride, (parts, total) = x.shape[1], rows.shape[2], books.shape[:2]
    for g in range(first, stop):
        rows[unit] = 0
        for e in range(codes.shape[1]):
            for r in range(ROWS):
                at = (unit * ROWS + r) * stride + places[0, e]
                for i in range(parts):
                    row = i * total + places[1, e] + np.int64(codes[g, e, r])
                    add_eight(rows, at + EIGHT * i, books, EIGHT * row)
        for k in range(cols):
            for r in range(ROWS):
                panel[unit, k, r] = rows[unit, r, k] * scale[ROWS * g + r]
        for t in range(0, out.shape[0], 2 * TOKENS):
            other = min(t + TOKENS, out.shape[0] - TOKENS)  # a second tile, or the same or some of it again
            a, b = zero_tokens(), zero_tokens()
            for k in range(cols):
                w = simd.load(panel, (unit * cols + k) * ROWS)
                a, b = simd.outer(a, w, x, t * cols + k, cols), simd.outer(b, w, x, other * cols + k, cols)
            simd.store(out, t * out.shape[1] + column + ROWS * g, out.shape[1], a)
            simd.store(out, other * out.shape[1] + column + ROWS * g, out.shape[1], b)


@kernel()
def multiply(state, codes, scale, books, places, x, rows, panel, out, column):
    """out[:, column:] = x Wᵀ; x and out have whole tiles of TOKENS rows. There is room for sixteen rows of a
    unit: rows f32 (units, 16, cols + 8 * parts), panel (units, cols, 16).
    """
    units = rows.shape[0]
    arguments = units, codes, scale, books, places, x, rows, panel, out, column
    pool.run(state, units, pool.job(multiply_unit, arguments))


class Product:
    """x Wᵀ for one matrix in AQLM, written into columns of a wider output: as `numba_backend.Product`."""

    def __init__(self, tensor: Tensor, release: Callable[[np.ndarray], None] = lambda data: None) -> None:
        self.w = w = prepare(tensor)
        release(tensor.data)
        (self.rows, self.cols), self.width = w.shape, len(w.scale)
        self.size, self.group = tensor.parts["codebooks"].shape[1:]
        x, out = np.zeros((1, self.cols), np.float32), np.zeros((1, ROWS), np.float32)
        state = pool.state()
        self.one = (by_rows if w.direct else by_tables).entry(state, *self.for_one(x, 0, out, 0))
        self.many = self.coarse = multiply.entry(state, *self.for_many(x, out, 0))

    def for_one(self, x: np.ndarray, token: int, out: np.ndarray, column: int) -> tuple:
        """What the kernel for a token takes."""
        w = self.w
        if w.direct:
            padded = np.zeros((1, self.cols + EIGHT * len(w.books)), np.float32)
            return w.codes, w.scale, w.books, w.places, x, token, padded, out, column
        table = scratch.empty((w.codes.shape[1], w.columns.shape[1]))
        return w.codes, w.scale, w.columns, w.places, self.size, self.group, x, token, table, out, column

    def for_many(self, x: np.ndarray, out: np.ndarray, column: int) -> tuple:
        """What the kernel for many tokens takes."""
        w = self.w
        units = min(len(w.codes), 4 * int(pool.state()[pool.THREADS]))
        rows = scratch.empty((units, ROWS, self.cols + EIGHT * len(w.books)))
        panel = scratch.empty((units, self.cols, ROWS))
        return w.codes, w.scale, w.books, w.places, x, rows, panel, out, column

    def __call__(self, x: np.ndarray, out: np.ndarray, column: int) -> None:
        """x f32 (n, cols); out f32 (n rounded up to a tile, width or more), from `column` on."""
        if len(x) <= FEW:
            for token in range(len(x)):
                self.one(pool.state(), *self.for_one(x, token, out, column))
            return
        if len(out) != len(x):
            padded = scratch.empty((len(out), self.cols))
            elementwise.add(pool.state(), x, np.zeros((1, self.cols), np.float32), padded[: len(x)])
            x = padded
        self.many(pool.state(), *self.for_many(x, out, column))
