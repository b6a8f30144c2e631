"""`additive.py` compiled: what is there by the same name is the specification.

Threads take rows in units, and every number is computed by one thread in one order, so results do not depend
on how many there are.
"""

from collections.abc import Callable

import numpy as np
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
def above(typing, tile, value):
    """Sixteen bits: which lanes are above a number."""

    def code(context, builder, sig, args):
        (v,) = _vectors(builder, args[0])
        mask = builder.fcmp_ordered(">", v, _splat(builder, args[1]))
        return builder.zext(builder.bitcast(mask, I16), I64)

    return types.int64(tile, types.float32), code


@njit(nogil=True)
def insert(gains, picks, count, gain, hypothesis, code):
    """Put a candidate in its place among the best: gains f32 (beam,), falling, of which `count` are there;
    picks i8 (beam, 2). Returns how many are there then.
    """
    count = min(count + 1, len(gains))
    i = count - 1
    while i > 0 and gains[i - 1] < gain:
        gains[i], picks[i, 0], picks[i, 1] = gains[i - 1], picks[i - 1, 0], picks[i - 1, 1]
        i -= 1
    gains[i], picks[i, 0], picks[i, 1] = gain, hypothesis, code
    return count


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
def choose_unit(unit, units, b, scale, books, squares, pairs, codes, owns, helds, gains_, picks_):
    """The rows of a unit."""
    count, width, entries = codes.shape[1], b.shape[1], books.shape[1]
    size = entries // count
    own, gains, picks, beam = owns[unit], gains_[unit], picks_[unit], helds.shape[2]
    lanes = np.empty(LANES, np.float32)
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
        for m in range(count):
            old[0, m] = codes[row, m]
        for m in range(count):
            found, least = 0, np.float32(-np.inf)
            for h in range(hypotheses):
                rest = simd.splat(gain_of(own, pairs, doubled, old, h, size, m))
                for c in range(0, size, LANES):
                    v = simd.add(simd.load(own, m * size + c), rest)
                    for k in range(count):
                        if k != m:
                            at = (k * size + old[h, k]) * entries + m * size + c
                            v = simd.fma(v, simd.load(pairs, at), simd.splat(-doubled))
                    better = above(v, least)
                    if better:
                        simd.store(lanes, 0, 0, v)
                        for i in range(LANES):
                            if better >> i & 1 and lanes[i] > least:
                                found = insert(gains, picks, found, lanes[i], h, c + i)
                                if found == beam:
                                    least = gains[beam - 1]
            for i in range(found):
                for k in range(count):
                    new[i, k] = old[picks[i, 0], k]
                new[i, m] = picks[i, 1]
            old, new, hypotheses = new, old, found
        before = gain_of(own, pairs, doubled, codes, row, size, -1)
        if gain_of(own, pairs, doubled, old, 0, size, -1) > before:
            for m in range(count):
                codes[row, m] = old[0, m]


@kernel(
    "void(i8[::1], i8, f4[:, ::1], f4[::1], f4[:, ::1], f4[::1], f4[:, ::1], i4[:, ::1], "
    "f4[:, ::1], i4[:, :, :, ::1], f4[:, ::1], i8[:, :, ::1])"
)
def choose_rows(state, units, b, scale, books, squares, pairs, codes, owns, helds, gains, picks):
    """`additive.choose`, of rows in that many units, with room for each: owns (units, entries), helds (units,
    2, beam, codebooks), gains (units, beam), picks (units, beam, 2).
    """
    arguments = units, b, scale, books, squares, pairs, codes, owns, helds, gains, picks
    pool.run(state, units, pool.job(choose_unit, arguments))


def choose(
    b: np.ndarray, scale: np.ndarray, of: tuple[np.ndarray, ...], codes: np.ndarray, beam: int
) -> None:
    """`additive.choose`"""
    state, (books, squares, pairs) = pool.state(), of
    units, count = min(len(b), int(UNITS_A_THREAD * state[pool.THREADS])), codes.shape[1]
    owns = np.empty((units, len(squares)), np.float32)
    helds = np.empty((units, 2, beam, count), np.int32)
    gains, picks = np.empty((units, beam), np.float32), np.empty((units, beam, 2), np.int64)
    choose_rows(state, units, b, scale, books, squares, pairs, codes, owns, helds, gains, picks)


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
