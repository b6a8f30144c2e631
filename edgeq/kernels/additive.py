"""`additive.py` compiled: what is there by the same name is the specification.

Threads take rows in units, and every number is computed by one thread in one order, so results do not depend
on how many there are.
"""

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ..tensor import Tensor
from . import matmul, pool, prepare, simd
from .jit import kernel
from .lanes import ROWS
from .matmul import TOKENS
from .simd import I16, I64, LANES, _splat, _vectors

UNITS_A_THREAD = 4


@intrinsic
def reaching(typing, tile, value):
    """Sixteen bits: which lanes are a number or more."""

    def code(context, builder, sig, args):
        (v,) = _vectors(builder, args[0])
        mask = builder.fcmp_ordered(">=", v, _splat(builder, args[1]))
        return builder.zext(builder.bitcast(mask, I16), I64)

    return types.int64(tile, types.float32), code


@intrinsic
def ones(typing, bits):
    """How many bits are set."""
    return types.int64(types.int64), lambda context, builder, sig, args: builder.ctpop(args[0])


@intrinsic
def lowest(typing, bits):
    """Which is the first bit that is set, of some that are."""
    return types.int64(types.int64), lambda context, builder, sig, args: builder.cttz(
        args[0], ir.IntType(1)(1)
    )


@njit(nogil=True, fastmath={"nnan", "nsz"})
def ends(tries, count):
    """The lowest and the highest of the first."""
    low, high = tries[0], tries[0]
    for i in range(count):
        low, high = min(low, tries[i]), max(high, tries[i])
    return low, high


@njit(nogil=True)
def worst_of_best(tries, count, room):
    """Of the `room` best of `count` tries, by bisection: what all of them reach, a number as near to it as
    there is that fewer reach, and how many do not.
    """
    (low, middle), high, above = ends(tries, count), np.float32(np.inf), 0
    while True:  # enough reach low, and too few, `above`, reach high
        found = 0
        for i in range(0, count, LANES):
            found += ones(reaching(simd.load(tries, i), middle))
        if found == room:
            return middle, middle, 0
        if found > room:
            low = middle
        else:
            high, above = middle, found
        middle = (low + high) / np.float32(2)
        if not low < middle < high:
            return low, high, room - above


@njit(nogil=True)
def gain_of(own, pairs, doubled, codes, row, size, left_out):
    """What the codes of a row gain, as `additive.choose` has it, but for one codebook's part."""
    total = np.float32(0)
    for m in range(codes.shape[1]):
        if m != left_out:
            a = m * size + codes[row, m]
            total += own[a]
            for k in range(m):
                if k != left_out:
                    total -= doubled * pairs[k * size + codes[row, k], a]
    return total


@njit(nogil=True)
def try_all(own, pairs, doubled, codes, row, size, m, tries, at):
    """Write to tries, from `at` on, what the codes of a row gain with each row of codebook m in their sum."""
    rest, less = simd.splat(gain_of(own, pairs, doubled, codes, row, size, m)), simd.splat(-doubled)
    for c in range(0, size, LANES):
        simd.store(tries, at + c, 0, simd.add(simd.load(own, m * size + c), rest))
    for k in range(codes.shape[1]):
        if k != m:
            pair = (k * size + codes[row, k]) * pairs.shape[1] + m * size
            for c in range(0, size, LANES):
                v = simd.fma(simd.load(tries, at + c), simd.load(pairs, pair + c), less)
                simd.store(tries, at + c, 0, v)


@njit(nogil=True)
def keep_best(tries, hypotheses, size, m, old, new):
    """Write to new i4 (beam, codebooks) the best of the old choices with each row of codebook m: of
    tries f32 (hypotheses * size,). Returns how many there are.
    """
    worst, better, others = worst_of_best(tries, hypotheses * size, len(new))
    found = 0
    for i in range(0, hypotheses * size, LANES):
        bits = reaching(simd.load(tries, i), worst)
        while bits:
            at = i + lowest(bits)
            bits &= bits - 1
            if tries[at] < better:
                others -= 1
                if others < 0:
                    continue
            for k in range(new.shape[1]):
                new[found, k] = old[at // size, k]
            new[found, m] = at % size
            found += 1
    return found


@njit(nogil=True)
def choose_unit(unit, units, b, scale, books, squares, pairs, codes, owns, helds, all_tries):
    """The rows of a unit."""
    last, width, entries = codes.shape[1] - 1, b.shape[1], books.shape[1]
    size = entries // codes.shape[1]
    own, tries = owns[unit], all_tries[unit]
    first, stop = matmul.share(unit, units, len(b))
    for row in range(first, stop):
        s = scale[row]
        square, doubled = simd.splat(-s * s), np.float32(2) * s * s
        for e in range(0, entries, LANES):
            v = simd.mul(simd.load(squares, e), square)
            for i in range(width):
                x = simd.splat(np.float32(2) * s * b[row, i])
                v = simd.fma(v, simd.load(books, i * entries + e), x)
            simd.store(own, e, 0, v)
        old, new, hypotheses = helds[unit, 0], helds[unit, 1], 1
        for m in range(last + 1):
            old[0, m] = codes[row, m]
        for m in range(last):
            for h in range(hypotheses):
                try_all(own, pairs, doubled, old, h, size, m, tries, h * size)
            hypotheses = keep_best(tries, hypotheses, size, m, old, new)
            old, new = new, old
        best, choice, code = gain_of(own, pairs, doubled, codes, row, size, -1), -1, 0
        for h in range(hypotheses):
            try_all(own, pairs, doubled, old, h, size, last, tries, 0)
            for c in range(0, size, LANES):
                bits = reaching(simd.load(tries, c), best)
                while bits:
                    i = c + lowest(bits)
                    bits &= bits - 1
                    if tries[i] > best:
                        best, choice, code = tries[i], h, i
        if choice >= 0:
            for m in range(last):
                codes[row, m] = old[choice, m]
            codes[row, last] = code


@kernel(
    "void(i8[::1], i8, f4[:, ::1], f4[::1], f4[:, ::1], f4[::1], f4[:, ::1], i4[:, ::1], "
    "f4[:, ::1], i4[:, :, :, ::1], f4[:, ::1])"
)
def choose_rows(state, units, b, scale, books, squares, pairs, codes, owns, helds, tries):
    """`additive.choose`, of rows in that many units, with room for each: owns (units, entries), helds (units,
    2, beam, codebooks), tries (units, beam * size).
    """
    arguments = units, b, scale, books, squares, pairs, codes, owns, helds, tries
    pool.run(state, units, pool.job(choose_unit, arguments))


def choose(
    b: np.ndarray, scale: np.ndarray, of: tuple[np.ndarray, ...], codes: np.ndarray, beam: int
) -> None:
    """`additive.choose`"""
    state, (books, squares, pairs) = pool.state(), of
    units, count = min(len(b), int(UNITS_A_THREAD * state[pool.THREADS])), codes.shape[1]
    owns = np.empty((units, len(squares)), np.float32)
    helds = np.empty((units, 2, beam, count), np.int32)
    tries = np.empty((units, beam * len(squares) // count), np.float32)
    choose_rows(state, units, b, scale, books, squares, pairs, codes, owns, helds, tries)


def times(h: np.ndarray) -> Callable[..., np.ndarray]:
    """`additive.times`"""
    h = np.ascontiguousarray(h, np.float32)
    data = prepare.prepare([Tensor("", "f32", h.shape, h.reshape(-1).view(np.uint8))]).data

    def product(x: np.ndarray, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop = len(h) if stop is None else stop
        first = start // ROWS
        groups = data[first : -(-stop // ROWS)]
        padded = np.zeros((-(-len(x) // TOKENS) * TOKENS, len(h)), np.float32)
        padded[: len(x)] = x
        out = np.empty((len(padded), len(groups) * ROWS), np.float32)
        matmul.many_float.entry(pool.state(), groups, padded, out, 0)(pool.state(), groups, padded, out, 0)
        return out[: len(x), start - first * ROWS : stop - first * ROWS]

    return product
