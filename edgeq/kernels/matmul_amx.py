"""y = x Wᵀ for many tokens on the matrix unit: weights and activations rounded to bfloat16.

Weights are unpacked to tiles once for all tokens, so that every format is equally fast, and nothing but the
two roundings, of 2⁻⁹ at most, is lost: less than by 8-bit activations. Weights that are floats are references
for others: they, and what they meet, are sums of two bfloat16, which lose 2⁻¹⁶.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from . import amx, pool, simd
from .amx import COLS, PAIR, TILE, _address, _interleave, _to_bfloat16
from .jit import kernel
from .matmul import Record, share, unit_count
from .simd import F32, I8, I32, I64, _constant, _data, _fma, _load, _splat, _store

ROWS = amx.ROWS
RUNS = 64  # runs whose weights are unpacked together, so that they stay in the cache
AHEAD = 2 * TILE  # activations come from a cache further out, and are asked for two runs ahead


@intrinsic
def unpack_run(typing, w, group, record, run, table, zero, out, index):
    """Write a run of w[group, record] as bfloat16, as the unit wants it, into the elements of out from
    `index` on; run: of the record; the others as `matmul.one` takes them.
    """
    fields = {name: (w.dtype.offset(name), w.dtype.typeof(name)) for name in w.dtype.fields}
    builds = Record(fields, w.dtype.size, 1, 1, False)

    def code(context, builder, sig, args):
        group, record, run, index = (
            context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 2, 3, 7)
        )
        zero = _splat(builder, context.cast(builder, args[5], sig.args[5], types.float32))
        records = builder.extract_value(context.make_array(w)(context, builder, args[0]).shape, 1)
        at = builder.mul(builder.add(builder.mul(group, records), record), I64(builds.size))
        base = _address(builder, _data(context, builder, w, args[0]), at)
        levels = _load(builder, _data(context, builder, table, args[4]), 0, ir.VectorType(I8, 16))
        to = _address(builder, _data(context, builder, sig.args[6], args[6]), builder.mul(index, I64(2)))
        i32, f32 = ir.VectorType(I32, 16), ir.VectorType(F32, 16)
        for half in range(builds.halves):
            of_scale = builds.scale_of(builder, run, half)
            scale = builds.numbers(builder, base, "scale", of_scale)
            if "offset" in fields:
                offset = builds.numbers(builder, base, "offset", of_scale)
            else:
                offset = builder.fneg(builder.fmul(scale, zero))
            for quad in range(8 // builds.halves * half, 8 // builds.halves * (half + 1)):
                codes = builder.bitcast(builds.operand(builder, base, run, levels, quad), i32)
                columns = []
                for k in range(4):
                    code = builder.and_(builder.lshr(codes, _constant(i32, 8 * k)), _constant(i32, 255))
                    columns.append(_fma(builder, offset, builder.sitofp(code, f32), scale))
                for k in (0, 2):
                    pair = _interleave(builder, _to_bfloat16(builder, columns[k], columns[k + 1]))
                    _store(builder, to, I64(128 * quad + 32 * k), pair)
        return context.get_dummy_value()

    return types.void(w, group, record, run, table, zero, out, index), code


@njit(nogil=True)
def round_tokens(unit, x, rounded):
    """Round the tokens of a tile; x f32 (n, cols); rounded int16 (tiles, runs, 16, 32)."""
    cols, runs = x.shape[1], rounded.shape[1]
    for t in range(ROWS * unit, min(ROWS * unit + ROWS, x.shape[0])):
        to = unit * runs * TILE + t % ROWS * COLS
        for run in range(cols // COLS):
            at = t * cols + COLS * run
            amx.round_row(rounded, to + run * TILE, simd.load(x, at), simd.load(x, at + 16))
        if cols % COLS:
            pad = np.zeros(COLS, np.float32)
            for i in range(cols % COLS):
                pad[i] = x[t, cols - cols % COLS + i]
            amx.round_row(rounded, to + (runs - 1) * TILE, simd.load(pad, 0), simd.load(pad, 16))


@njit(nogil=True)
def rows_unit(unit, units, w, runs, table, zero, rounded, out, column):
    """The rows of a unit, for all tokens."""
    groups, records, all_runs, width = w.shape[0], w.shape[1], w.shape[1] * runs, out.shape[1]
    step = max(1, RUNS // runs)  # records that are unpacked together
    apart = min(records, step) * runs * TILE
    weights = amx.room(2 * apart)
    first, stop = share(unit, units, (groups + 1) // 2)
    amx.configure(amx.CONFIG)
    for pair in range(first, stop):
        other = min(2 * pair + 1, groups - 1) - 2 * pair  # 0 when there is no second group
        for r0 in range(0, records, step):
            r1 = min(records, r0 + step)
            for j in range(other + 1):
                for r in range(r0, r1):
                    for run in range(runs):
                        at = j * apart + ((r - r0) * runs + run) * TILE
                        unpack_run(w, 2 * pair + j, r, run, table, zero, weights, at)
            for t in range(0, rounded.shape[0], 2):
                place = ROWS * t * width + column + PAIR * pair
                if r0:
                    amx.resume(out, place, width, ROWS * other)
                else:
                    amx.start()
                x = (t * all_runs + r0 * runs) * TILE
                for k in range(0, (r1 - r0) * runs * TILE, TILE):
                    second = x + all_runs * TILE + k
                    amx.load(rounded, x + k, second, True)
                    amx.load(weights, k, k + other * apart, False)
                    amx.prefetch(rounded, x + k + AHEAD)
                    amx.prefetch(rounded, second + AHEAD)
                    amx.multiply()
                amx.finish(out, place, width, ROWS * other)
    amx.release()


@kernel()
def many(state, w, runs, table, zero, x, rounded, out, column):
    """out[:n, column:] = x Wᵀ for n tokens; w, runs, table and zero as for `matmul.many`; x f32 (n, cols);
    rounded: room for int16 (tiles, runs, 16, 32), and out f32 has as many rows, of an even number of tiles.
    """
    pool.run(state, rounded.shape[0], pool.job(round_tokens, (x, rounded)))
    units = unit_count(state, w, (w.shape[0] + 1) // 2)
    pool.run(state, units, pool.job(rows_unit, (units, w, runs, table, zero, rounded, out, column)))


@njit(nogil=True)
def split_tokens(unit, x, split):
    """Split the tokens of a tile; x f32 (n, cols); split int16 (tiles, 2, runs, 16, 32): high halves, low
    ones.
    """
    cols, low = x.shape[1], split.shape[2] * TILE
    pad = np.zeros(COLS, np.float32)
    for t in range(ROWS * unit, min(ROWS * unit + ROWS, x.shape[0])):
        to, at = unit * 2 * low + t % ROWS * COLS, t * cols
        for run in range(cols // COLS):
            here = to + run * TILE
            amx.split_row(split, here, here + low, simd.load(x, at), simd.load(x, at + 16))
            at += COLS
        if cols % COLS:
            for i in range(cols % COLS):
                pad[i] = x[t, cols - cols % COLS + i]
            here = to + low - TILE
            amx.split_row(split, here, here + low, simd.load(pad, 0), simd.load(pad, 16))


@njit(nogil=True)
def floats_as_tiles(w, group, first, stop, weights, to, low):
    """Write the runs first .. stop - 1 of a group of rows to weights, from `to` on, low halves `low` further;
    w floats (groups, cols, 16).
    """
    cols, zero = w.shape[1], simd.splat(np.float32(0))
    for k in range(COLS * first, COLS * stop, 2):
        at = (group * cols + k) * 16
        a = simd.load(w, at) if k < cols else zero
        b = simd.load(w, at + 16) if k + 1 < cols else zero
        amx.split_pair(weights, to, to + low, a, b)
        to += COLS


@njit(nogil=True)
def float_rows_unit(unit, units, w, split, out, column):
    """The rows of a unit, for all tokens."""
    groups, runs, width = w.shape[0], split.shape[2], out.shape[1]
    step = min(runs, RUNS)  # runs that are split together
    apart, w_low, x_low = step * TILE, 2 * step * TILE, runs * TILE
    weights = amx.room(2 * w_low)
    first, stop = share(unit, units, (groups + 1) // 2)
    amx.configure(amx.CONFIG)
    for pair in range(first, stop):
        other = min(2 * pair + 1, groups - 1) - 2 * pair  # 0 when there is no second group
        for r0 in range(0, runs, step):
            r1 = min(runs, r0 + step)
            for j in range(other + 1):
                floats_as_tiles(w, 2 * pair + j, r0, r1, weights, j * apart, w_low)
            for t in range(0, split.shape[0], 2):
                place = ROWS * t * width + column + PAIR * pair
                if r0:
                    amx.resume(out, place, width, ROWS * other)
                else:
                    amx.start()
                x = 2 * t * x_low + r0 * TILE
                second = x + 2 * x_low
                amx.multiply_split(split, x, second, x_low, weights, 0, other * apart, w_low, r1 - r0)
                amx.finish(out, place, width, ROWS * other)
    amx.release()


@kernel()
def many_float(state, w, x, split, out, column):
    """out[:n, column:] = x Wᵀ for n tokens; w floats (groups, cols, 16), x f32 (n, cols); split: room for
    int16 (tiles, 2, runs, 16, 32), and out f32 has as many rows, of an even number of tiles.
    """
    pool.run(state, split.shape[0], pool.job(split_tokens, (x, split)))
    units = unit_count(state, w, (w.shape[0] + 1) // 2)
    pool.run(state, units, pool.job(float_rows_unit, (units, w, split, out, column)))
