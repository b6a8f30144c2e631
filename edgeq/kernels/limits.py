"""What this machine can do at best: the limits that kernels are measured against.

read        loads from memory and nothing else; a core fetches faster from several places than from one
multiply    products of bytes in registers and nothing else: no loads, and no sum waits for itself; a
            matrix unit's products may pass it
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from . import pool, simd
from .jit import kernel
from .lanes import MEMORY
from .simd import I8, I32, I64, _data, _dot4, _load, _tile, _vectors

STREAMS = (1, 2, 4, 8)  # places that each thread reads from in turn
BURST = 4  # vectors that it loads from one of them
UNITS = 16
# 256 MiB, more than caches hold; an odd number of bursts a stream, because at powers of two all streams would
# meet in the same lines of the cache
BYTES = UNITS * max(STREAMS) * 64 * BURST * 8201
# sums of dot products under way, as many as the registers hold; rounds without a branch; turns of a unit
CHAINS, ROUNDS, TURNS = max(3, 12 * simd.PATH.bits // 512), 8, 1 << 16


def _make_lines(count):
    """A function (data, byte) that loads `count` vectors of 64 bytes."""
    tile = simd.Tile("i32", count)

    @intrinsic
    def lines(typing, data, byte):
        def code(context, builder, sig, args):
            base, at = _data(context, builder, data, args[0]), args[1]
            places = [builder.add(at, I64(64 * i)) for i in range(count)]
            return _tile(builder, [_load(builder, base, place, tile.vector) for place in places])

        return tile(data, types.int64), code

    return lines


lines_read, lines_multiplied = _make_lines(BURST), _make_lines(CHAINS)


@intrinsic
def xor(typing, a, b):
    """a ^ b"""

    def code(context, builder, sig, args):
        pairs = zip(*(_vectors(builder, tile) for tile in args), strict=True)
        return _tile(builder, [builder.xor(*pair) for pair in pairs])

    return a(a, b), code


@intrinsic
def dot_with_each_other(typing, acc, w):
    """To every sum, add the dot products of w with its neighbor's bytes, round after round: none can be left
    out.
    """

    def code(context, builder, sig, args):
        sums, v64 = _vectors(builder, args[0]), ir.VectorType(I8, 64)
        fixed = builder.bitcast(_vectors(builder, args[1])[0], v64)
        for i in [*range(CHAINS)] * ROUNDS:
            x = builder.bitcast(sums[(i + 1) % CHAINS], v64)
            sums[i] = _dot4(builder, sums[i], fixed, x, wide=False)
        return _tile(builder, sums)

    return acc(acc, w), code


@intrinsic
def any_lane(typing, tile):
    """A number that every lane has a part in."""

    def code(context, builder, sig, args):
        first, *others = _vectors(builder, args[0])
        for v in others:
            first = builder.xor(first, v)
        return simd._call(builder, f"llvm.vector.reduce.xor.v{simd.LANES}i32", I32, first)

    return types.int32(tile), code


@njit(nogil=True)
def read_unit(unit, data, streams, out):
    """Load a unit's share of the data, and combine it to a number, so that no load can be left out."""
    size = data.size // (UNITS * streams)
    start = unit * streams * size
    first = lines_read(data, start)
    acc = xor(first, first)
    for at in range(0, size, 64 * BURST):
        for stream in range(streams):
            acc = xor(acc, lines_read(data, start + stream * size + at))
    out[unit] = any_lane(acc)


@kernel("void(i8[::1], u1[::1], i8, i4[::1])")
def read_all(state, data, streams, out):
    """Load data, its size a multiple of what all units load in turn."""
    pool.run(state, UNITS, pool.job(read_unit, (data, streams, out)))


@njit(nogil=True)
def multiply_unit(unit, data, turns, out):
    """A unit's share of the products."""
    acc, w = lines_multiplied(data, 0), lines_multiplied(data, 64 * CHAINS)
    for _ in range(turns):
        acc = dot_with_each_other(acc, w)
    out[unit] = any_lane(acc)


@kernel("void(i8[::1], u1[::1], i8, i4[::1])")
def multiply_all(state, data, turns, out):
    """Multiply what the first lines of data hold, again and again."""
    pool.run(state, UNITS, pool.job(multiply_unit, (data, turns, out)))


class Limits:
    """Work to be timed within `pool.computing`; its memory is taken once.

    Attributes
    ----------
    out : int32, a number for each unit that its work came to.
    """

    def __init__(self) -> None:
        self.data, self.out = MEMORY.take((BYTES,), np.dtype(np.uint8)), np.zeros(UNITS, np.int32)
        self.data[:] = 7  # pages that were never written are all the same one

    def read(self, streams: int) -> int:
        """Load all the data from memory; returns the bytes."""
        read_all(pool.state(), self.data, streams, self.out)
        return self.data.size

    def multiply(self, turns: int = TURNS) -> int:
        """Multiply bytes in registers; returns how many products."""
        multiply_all(pool.state(), self.data, turns, self.out)
        return UNITS * turns * ROUNDS * CHAINS * 64
