"""AMX, the matrix unit of Intel's servers, on bfloat16.

The unit has eight tiles of 16 rows of 64 bytes, and an instruction that does 8,192 multiply-adds in 16
cycles:

    acc[i, j] += Σ_k x[i, k] w[k, j]      16 rows of x, 16 columns of w, 32 numbers k; acc float32

where a row of w's tile is a pair of numbers k, two neighbours of each of the sixteen columns. Here two
tiles of x always meet two of w, as each operand then serves twice: four tiles accumulate, four hold
operands. A tile in memory is 512 numbers, int16 that stand for bfloat16, from a cache line on.

A float32 is the sum of two bfloat16 to 16 bits, so that three products, of high with high, high with low,
and low with high, come near what float32 would give.
"""

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic

from . import simd
from .simd import I8, I16, I32, I64, _constant, _data, _load, _prefetch, _shuffle, _store

ROWS, COLS = 16, 32  # numbers of a tile of x
TILE = ROWS * COLS
PAIR = 2 * ROWS  # rows of x, and columns of w, that meet at once
ACC, X, W = (0, 1, 2, 3), (4, 5), (6, 7)  # the tiles: ACC[2 * i + j] of tokens i and rows j
# what `ldtilecfg` reads: palette 1, and of each of eight tiles 64 bytes a row, 16 rows
CONFIG = np.zeros(64, np.uint8)
CONFIG[0], CONFIG[16:32:2], CONFIG[48:56] = 1, 64, ROWS


binding.initialize_native_asmparser()  # for `_to_bfloat16`


def _intrinsic(builder, name, *args):
    """Call one of LLVM's AMX intrinsics, whose tiles are numbers."""
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
    name = "llvm.x86." + name
    known = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(known, args)


def _address(builder, base, offset):
    """The address of the byte at an offset."""
    return builder.gep(base, [offset])


def _to_bfloat16(builder, low, high):
    """Two <16 x float> rounded to bfloat16, one after the other: <32 x i16>."""
    out = ir.VectorType(I16, 32)
    kind = ir.FunctionType(out, [high.type, low.type])
    return builder.asm(kind, "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v", [high, low], False)


def _interleave(builder, v):
    """<32 x i16>: numbers 0, 16, 1, 17, …"""
    return _shuffle(builder, v, v, [16 * j + i for i in range(16) for j in (0, 1)])


def _split(builder, v):
    """<16 x float> as the sum of a bfloat16, still in <16 x float>, and of the rest."""
    bits = builder.bitcast(v, ir.VectorType(I32, 16))
    high = builder.bitcast(builder.and_(bits, _constant(bits.type, -65536)), v.type)
    return high, builder.fsub(v, high)


@intrinsic
def configure(typing, config):
    """Give the tiles their shape; to be undone by `release`, in the same thread."""

    def code(context, builder, sig, args):
        _intrinsic(builder, "ldtilecfg", _data(context, builder, config, args[0]))
        return context.get_dummy_value()

    return types.void(config), code


@intrinsic
def release(typing):
    """Empty the tiles, which the system then need not save."""

    def code(context, builder, sig, args):
        _intrinsic(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def start(typing):
    """Zero what accumulates."""

    def code(context, builder, sig, args):
        for tile in ACC:
            _intrinsic(builder, "tilezero", I8(tile))
        return context.get_dummy_value()

    return types.void(), code


def _each_part(context, builder, sig, args):
    """(number, address, bytes from row to row) of the tiles that accumulate, in out f32 (n, width)."""
    index, stride, apart = (
        context.cast(builder, a, t, types.intp) for a, t in zip(args[1:], sig.args[1:], strict=True)
    )
    base = _data(context, builder, sig.args[0], args[0])
    for tile in ACC:
        i, j = divmod(tile, 2)
        at = builder.add(index, builder.mul(stride, I64(ROWS * i)))
        at = builder.add(at, builder.mul(apart, I64(j)))
        yield I8(tile), _address(builder, base, builder.mul(at, I64(4))), builder.mul(stride, I64(4))


@intrinsic
def resume(typing, out, index, stride, apart):
    """Take what accumulates from out, float32: 32 rows, `stride` numbers each, sixteen numbers from `index`
    on and as many `apart` numbers further.
    """

    def code(context, builder, sig, args):
        for part in _each_part(context, builder, sig, args):
            _intrinsic(builder, "tileloadd64", *part)
        return context.get_dummy_value()

    return types.void(out, index, stride, apart), code


@intrinsic
def finish(typing, out, index, stride, apart):
    """Store where `resume` takes it from."""

    def code(context, builder, sig, args):
        for part in _each_part(context, builder, sig, args):
            _intrinsic(builder, "tilestored64", *part)
        return context.get_dummy_value()

    return types.void(out, index, stride, apart), code


@intrinsic(prefer_literal=True)
def load(typing, array, one, other, of_x):
    """Load the two tiles of x, or of w, that begin at these elements of array, int16."""
    tiles = X if of_x.literal_value else W

    def code(context, builder, sig, args):
        base = _data(context, builder, array, args[0])
        for tile, arg in zip(tiles, (1, 2), strict=True):
            at = builder.mul(context.cast(builder, args[arg], sig.args[arg], types.intp), I64(2))
            _intrinsic(builder, "tileloadd64", I8(tile), _address(builder, base, at), I64(64))
        return context.get_dummy_value()

    return types.void(array, one, other, of_x), code


@intrinsic
def multiply(typing):
    """Add the products of the tiles of x with those of w to what accumulates."""

    def code(context, builder, sig, args):
        for acc in ACC:
            _intrinsic(builder, "tdpbf16ps", I8(acc), I8(X[acc // 2]), I8(W[acc % 2]))
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def prefetch(typing, array, index):
    """Ask for the tile that begins at an element of array, int16; it need not exist."""

    def code(context, builder, sig, args):
        base = _data(context, builder, array, args[0])
        at = builder.mul(context.cast(builder, args[1], sig.args[1], types.intp), I64(2))
        for line in range(0, 2 * TILE, 64):
            _prefetch(builder, base, builder.add(at, I64(line)))
        return context.get_dummy_value()

    return types.void(array, index), code


def _store_rounded(pairs):
    """Make `store_rounded` for rows of x, or for pairs of rows of w."""

    @intrinsic
    def store_rounded(typing, out, index, a, b):
        """Round the lanes of a, then those of b, to bfloat16 in the elements of out from `index` on."""

        def code(context, builder, sig, args):
            at = builder.mul(context.cast(builder, args[1], sig.args[1], types.intp), I64(2))
            (low,), (high,) = (simd._vectors(builder, args[i]) for i in (2, 3))
            numbers = _to_bfloat16(builder, low, high)
            base = _data(context, builder, out, args[0])
            _store(builder, base, at, _interleave(builder, numbers) if pairs else numbers)
            return context.get_dummy_value()

        return types.void(out, index, a, b), code

    return store_rounded


def _store_split(pairs):
    """Make `store_split` for rows of x, or for pairs of rows of w."""

    @intrinsic
    def store_split(typing, out, index, low, a, b):
        """Store thirty-two numbers as `store_rounded` does, from element `index` on, and what the rounding
        left from `low` on.
        """

        def code(context, builder, sig, args):
            base = _data(context, builder, out, args[0])
            halves = zip(*(_split(builder, simd._vectors(builder, args[i])[0]) for i in (3, 4)), strict=True)
            for i, half in zip((1, 2), halves, strict=True):
                at = builder.mul(context.cast(builder, args[i], sig.args[i], types.intp), I64(2))
                numbers = _to_bfloat16(builder, *half)
                _store(builder, base, at, _interleave(builder, numbers) if pairs else numbers)
            return context.get_dummy_value()

        return types.void(out, index, low, a, b), code

    return store_split


round_row, round_pair = _store_rounded(False), _store_rounded(True)
split_row, split_pair = _store_split(False), _store_split(True)


@intrinsic
def turn(typing, tiles, index):
    """Make of the tile that begins at an element of tiles, int16, that of its transpose as the other operand:
    pair k of row i becomes row k's pair i.
    """

    def code(context, builder, sig, args):
        at = builder.mul(context.cast(builder, args[1], sig.args[1], types.intp), I64(2))
        base, kind = _address(builder, _data(context, builder, tiles, args[0]), at), ir.VectorType(I32, 16)
        rows = [_load(builder, base, 64 * i, kind) for i in range(ROWS)]
        for step in (1, 2, 4, 8):  # rows i and i + step exchange the parts of columns where they differ
            low = [j if not j & step else j - step + 16 for j in range(16)]
            high = [j + step if not j & step else j + 16 for j in range(16)]
            for i in (i for i in range(ROWS) if not i & step):
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = _shuffle(builder, a, b, low), _shuffle(builder, a, b, high)
        for i, row in enumerate(rows):
            _store(builder, base, I64(64 * i), row)
        return context.get_dummy_value()

    return types.void(tiles, index), code


@njit(nogil=True)
def room(count):
    """An array of any content for numbers in tiles, int16 (count,)."""
    made = np.empty(count + 32, np.int16)
    first = (-made.ctypes.data % 64) // 2
    return made[first : first + count]


@njit(nogil=True)
def multiply_rounded(x, first, second, w, one, other, count):
    """Add the products of `count` tiles, one after the other in x and in w, to what accumulates."""
    for k in range(0, count * TILE, TILE):
        load(x, first + k, second + k, True)
        load(w, one + k, other + k, False)
        multiply()


@njit(nogil=True)
def multiply_split(x, first, second, x_low, w, one, other, w_low, count):
    """Add the products of `count` tiles, one after the other in x and in w, to what accumulates; x_low and
    w_low: from the tiles' high halves to the low ones.
    """
    for k in range(0, count * TILE, TILE):
        load(x, first + k, second + k, True)
        load(w, one + w_low + k, other + w_low + k, False)
        multiply()
        load(w, one + k, other + k, False)
        multiply()
        load(x, first + x_low + k, second + x_low + k, True)
        multiply()
