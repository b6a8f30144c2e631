"""y = x Wᵀ on prepared lanes: by far the most time of a model is spent in this file.

Two loops, for one token and for many, over groups of sixteen output rows. Threads take the groups in units,
so that every output is computed by one thread in one order, whatever the number of threads. For many tokens a
tile of them shares each unpacked operand.
"""

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from . import pool, simd
from .activations import quantize_row
from .jit import kernel
from .lanes import PLANE_BYTES, RUN
from .simd import F32, I8, I32, I64, _constant, _data, _dot4, _fma, _load, _load_f32, _lookup, _splat

TOKENS = simd.PATH.tokens
zero_one = simd.make_zero(1)
zero_many = simd.make_zero(TOKENS)


def _operand(builder, planes, run, table, quad):
    """The codes of a quad, <64 x i8>, put together from the planes; planes: {name: address of the record's
    plane}.
    """
    v64 = ir.VectorType(I8, 64)
    code, shift = None, 0
    for name in PLANE_BYTES:
        if name not in planes:
            continue
        bits = int(name[1])
        vectors = PLANE_BYTES[name] // 64
        at = builder.add(builder.mul(run, I64(PLANE_BYTES[name])), I64(64 * (quad % vectors)))
        part = _load(builder, planes[name], at, v64)
        move = bits * (quad // vectors)
        if move > shift:
            part = builder.lshr(part, _constant(v64, move - shift))
        elif move < shift:
            part = builder.shl(part, _constant(v64, shift - move))
        if bits < 8:
            part = builder.and_(part, _constant(v64, ((1 << bits) - 1) << shift))
        code = part if code is None else builder.or_(code, part)
        shift += bits
    return _lookup(builder, table, code) if "t4" in planes else code


@intrinsic
def add_run(typing, acc, w, group, record, run, table, zero, codes, scale, sums, token):
    """Add the products of a run of 32 columns to acc: sixteen rows, and as many tokens as acc has vectors.

    w: array of records, of which w[group, record] is used; run: of the record; codes (n, cols), scale (n,
    runs), sums (n, 2 runs): the quantized activations, int8 or int16; token: the first of the tile. All
    arrays are contiguous.
    """
    fine = codes.dtype == types.int16
    kind = w.dtype
    fields = {name: (kind.offset(name), kind.typeof(name)) for name in kind.fields}
    runs = fields[next(p for p in PLANE_BYTES if p in fields)][1].shape[0]
    groups = fields["scale"][1].shape[0]
    halves = 2 if groups == 2 * runs else 1
    wide = "p8" in fields or "t4" in fields

    def code(context, builder, sig, args):
        i32, f32, v64 = ir.VectorType(I32, 16), acc.vector, ir.VectorType(I8, 64)
        acc_, w_, _, _, _, table_, zero_, codes_, scale_, sums_, _ = args
        group_, record_, run_, token_ = (
            context.cast(builder, args[i], sig.args[i], types.intp) for i in (2, 3, 4, 10)
        )
        records = builder.extract_value(context.make_array(w)(context, builder, w_).shape, 1)
        index = builder.add(builder.mul(group_, records), record_)
        base = builder.gep(_data(context, builder, w, w_), [builder.mul(index, I64(kind.size))])
        at = {name: builder.gep(base, [I64(offset)]) for name, (offset, _) in fields.items()}
        planes = {name: at[name] for name in PLANE_BYTES if name in fields}
        table_ = _load(builder, _data(context, builder, table, table_), 0, ir.VectorType(I8, 16))
        runs_in_row = builder.mul(records, I64(runs))
        first = builder.add(builder.mul(record_, I64(runs)), run_)
        tokens = [builder.add(token_, I64(i)) for i in range(acc.count)]
        here = [builder.add(builder.mul(t, runs_in_row), first) for t in tokens]
        # where each token's codes of this run begin: those of high bytes, if there are any, and of low bytes
        row_bytes = builder.mul(runs_in_row, I64(RUN * (2 if fine else 1)))
        high_bytes = [builder.add(builder.mul(t, row_bytes), builder.mul(first, I64(RUN))) for t in tokens]
        low_bytes = high_bytes
        if fine:
            low_bytes = [builder.add(at, builder.mul(runs_in_row, I64(RUN))) for at in high_bytes]
        codes_, scale_, sums_ = (
            _data(context, builder, kind, array)
            for kind, array in ((codes, codes_), (scale, scale_), (sums, sums_))
        )

        def numbers(name, group):
            """Sixteen scales or offsets of a group, as float32."""
            dtype = fields[name][1].dtype
            v = _load_f32(builder, at[name], builder.mul(group, I64(16 * dtype.bitwidth // 8)), dtype)
            unit = {"scale": "unit", "offset": "offset_unit"}[name]
            if unit in fields:
                v = builder.fmul(v, _load_f32(builder, at[unit], 0, fields[unit][1].dtype))
            return v

        def total(token, half):
            """Sum of the token's codes that meet this half of the run, i32."""
            sixteens = [half] if halves == 2 else [0, 1]
            at = [builder.add(builder.mul(token, I64(8)), I64(4 * i)) for i in sixteens]
            parts = [_load(builder, sums_, a, I32) for a in at]
            return parts[0] if halves == 2 else builder.add(*parts)

        out = simd._vectors(builder, acc_)
        for half in range(halves):
            quads = range(8 // halves * half, 8 // halves * (half + 1))
            totals = [total(h, half) for h in here]
            # codes count from zero, weights from the code `zero`; an offset has that in it already
            low = [_constant(i32, 0)] * acc.count
            if "offset" not in fields:
                low = [_splat(builder, builder.mul(builder.neg(zero_), t)) for t in totals]
            high = [_constant(i32, 0)] * acc.count
            for quad in quads:
                operand = _operand(builder, planes, run_, table_, quad)
                for i in range(acc.count):
                    for dots, start in [(high, high_bytes), (low, low_bytes)][0 if fine else 1 :]:
                        four = _load(builder, codes_, builder.add(start[i], I64(4 * quad)), I32)
                        x = builder.bitcast(_splat(builder, four), v64)
                        dots[i] = _dot4(builder, dots[i], operand, x, wide)
            if fine:
                high = [builder.shl(h, _constant(i32, 8)) for h in high]
                low = [builder.add(*pair) for pair in zip(high, low, strict=True)]
            if halves == 2:
                group = builder.add(builder.mul(run_, I64(2)), I64(half))
            elif groups == runs:
                group = run_
            else:
                group = builder.udiv(run_, I64(runs // groups))
            d = numbers("scale", group)
            o = numbers("offset", group) if "offset" in fields else None
            for i, h in enumerate(here):
                s = _load(builder, scale_, builder.mul(h, I64(4)), F32)
                out[i] = _fma(
                    builder, out[i], builder.sitofp(low[i], f32), builder.fmul(d, _splat(builder, s))
                )
                if o is not None:
                    x = builder.fmul(builder.sitofp(totals[i], F32), s)
                    out[i] = _fma(builder, out[i], o, _splat(builder, x))
        return simd._tile(builder, out)

    return acc(acc, w, group, record, run, table, types.int32, codes, scale, sums, token), code


# What a thread takes at a time: a run of memory long enough for the processor to fetch ahead (a quarter of
# the speed
# of SmolLM2 against 16 KB), and some units for each thread, so that none waits long for another's last one.
UNIT_BYTES, UNITS_A_THREAD = 1 << 17, 3


@njit(nogil=True)
def unit_count(state, w):
    """Number of units that a matrix's groups of rows are cut into."""
    return min(w.shape[0], max(w.nbytes // UNIT_BYTES, UNITS_A_THREAD * state[pool.THREADS]))


@njit(nogil=True)
def unit_groups(unit, units, groups):
    """First group of rows of a unit, and the one after its last."""
    return groups * unit // units, groups * (unit + 1) // units


@njit(nogil=True)
def quantize_tokens(unit, x, codes, scale, sums):
    """Quantize the tokens of a tile."""
    for t in range(unit * TOKENS, min(unit * TOKENS + TOKENS, x.shape[0])):
        quantize_row(x, codes, scale, sums, t)


@njit(nogil=True)
def one_unit(unit, units, w, runs, table, zero, codes, scale, sums, out, column):
    """The rows of a unit, for one token."""
    first, stop = unit_groups(unit, units, w.shape[0])
    for g in range(first, stop):
        acc = zero_one()
        for r in range(w.shape[1]):
            for run in range(runs):
                acc = add_run(acc, w, g, r, run, table, zero, codes, scale, sums, 0)
        simd.store(out, column + 16 * g, 0, acc)


@kernel()
def one(state, w, runs, table, zero, x, codes, scale, sums, out, column):
    """out[0, column:] = x Wᵀ for one token; w (groups, records) of `runs` runs, x f32 (1, cols), out f32."""
    quantize_row(x, codes, scale, sums, 0)
    units = unit_count(state, w)
    job = pool.job(one_unit, (units, w, runs, table, zero, codes, scale, sums, out, column))
    pool.run(state, units, job)


@njit(nogil=True)
def many_unit(unit, units, w, runs, table, zero, codes, scale, sums, out, column):
    """The rows of a unit, for all tokens."""
    first, stop = unit_groups(unit, units, w.shape[0])
    for g in range(first, stop):
        for t in range(0, out.shape[0], TOKENS):
            acc = zero_many()
            for r in range(w.shape[1]):
                for run in range(runs):
                    acc = add_run(acc, w, g, r, run, table, zero, codes, scale, sums, t)
            simd.store(out, t * out.shape[1] + column + 16 * g, out.shape[1], acc)


@kernel()
def many(state, w, runs, table, zero, x, codes, scale, sums, out, column):
    """out[:n, column:] = x Wᵀ for n tokens; codes, scale, sums and out have whole tiles of TOKENS rows."""
    pool.run(state, out.shape[0] // TOKENS, pool.job(quantize_tokens, (x, codes, scale, sums)))
    units = unit_count(state, w)
    job = pool.job(many_unit, (units, w, runs, table, zero, codes, scale, sums, out, column))
    pool.run(state, units, job)


@njit(nogil=True)
def one_float_unit(unit, units, w, x, out, column):
    """The rows of a unit, for one token."""
    cols = w.shape[1]
    first, stop = unit_groups(unit, units, w.shape[0])
    for g in range(first, stop):
        a, b, c, d = zero_one(), zero_one(), zero_one(), zero_one()
        for k in range(0, cols - 3, 4):  # four sums, because one would wait for its own last addition
            at = (g * cols + k) * 16
            a = simd.outer(a, simd.load(w, at), x, k, 0)
            b = simd.outer(b, simd.load(w, at + 16), x, k + 1, 0)
            c = simd.outer(c, simd.load(w, at + 32), x, k + 2, 0)
            d = simd.outer(d, simd.load(w, at + 48), x, k + 3, 0)
        for k in range(cols // 4 * 4, cols):
            a = simd.outer(a, simd.load(w, (g * cols + k) * 16), x, k, 0)
        simd.store(out, column + 16 * g, 0, simd.add(simd.add(a, b), simd.add(c, d)))


@kernel()
def one_float(state, w, x, out, column):
    """out[0, column:] = x Wᵀ for one token; w (groups, cols, 16), as `simd.kernel_view` has floats, x f32."""
    units = unit_count(state, w)
    pool.run(state, units, pool.job(one_float_unit, (units, w, x, out, column)))


@njit(nogil=True)
def many_float_unit(unit, units, w, x, out, column):
    """The rows of a unit, for all tokens."""
    cols = w.shape[1]
    first, stop = unit_groups(unit, units, w.shape[0])
    for g in range(first, stop):
        for t in range(0, out.shape[0], TOKENS):
            acc = zero_many()
            for k in range(cols):
                acc = simd.outer(acc, simd.load(w, (g * cols + k) * 16), x, t * cols + k, cols)
            simd.store(out, t * out.shape[1] + column + 16 * g, out.shape[1], acc)


@kernel()
def many_float(state, w, x, out, column):
    """out[:, column:] = x Wᵀ; x and out have whole tiles of TOKENS rows."""
    units = unit_count(state, w)
    pool.run(state, units, pool.job(many_float_unit, (units, w, x, out, column)))
