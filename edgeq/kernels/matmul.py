"""y = x Wᵀ on prepared lanes: by far the most time of a model is spent in this file.

Two loops over groups of sixteen output rows. The one for a single token has the memory to wait for, and reads
several groups side by side; in the one for many, a tile of tokens shares each unpacked operand. Threads take
the groups in units, so that every output is computed by one thread in one order, whatever the number of
threads, and of tokens.
"""

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from . import pool, simd
from .activations import quantize_row
from .jit import kernel
from .lanes import PLANE_BYTES
from .simd import (
    F32,
    I8,
    I32,
    I64,
    _constant,
    _data,
    _dot4,
    _field,
    _fma,
    _keep,
    _load,
    _load_f32,
    _lookup,
    _prefetch,
    _splat,
)

# A product of several tokens takes four of them and two groups of rows at a time, where there are registers
# enough: few tokens leave little of a tile empty, and each activation serves twice.
TOKENS = min(4, simd.PATH.tokens)
GROUPS = simd.PATH.tokens // TOKENS
# A product of one token waits for memory, so it reads that many groups of rows side by side, and asks for
# each of them that many bytes ahead: a core that reads one run of memory gets half of what it gets from
# several.
STREAMS = 4 if simd.PATH.tokens > 4 else 2
AHEAD = 1280
zero_one = simd.make_zero(STREAMS)
zero_many, zero_groups = simd.make_zero(TOKENS, GROUPS), simd.make_zero(GROUPS)


def _make_add_run(groups, tokens):
    """Make `add_run` for tiles of that many groups of rows, times that many tokens."""

    @intrinsic
    def add_run(typing, acc, w, group, last, record, run, table, codes, scale, sums, tile):
        """Add the products of a run of 32 columns to acc: vector t * groups + i is of group i and token t.

        w: array of records, of which w[group, record] and the same of the next groups are used, but none
        after group `last`, whose products stand for those that are not there; run: of the record; codes (n,
        cols), scale and sums (n, runs): the quantized activations in tiles of as many tokens; tile: number of
        the one to take. All arrays are contiguous.
        """
        kind = w.dtype
        fields = {name: (kind.offset(name), kind.typeof(name)) for name in kind.fields}
        builds = Record(fields, kind.size, groups, tokens, codes.dtype == types.int16)

        def code(context, builder, sig, args):
            acc_, w_, _, _, _, _, table_, codes_, scale_, sums_, _ = args
            ints = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (2, 3, 4, 5, 10))
            arrays = ((w, w_), (table, table_), (codes, codes_), (scale, scale_), (sums, sums_))
            data = (_data(context, builder, kind, array) for kind, array in arrays)
            records = builder.extract_value(context.make_array(w)(context, builder, w_).shape, 1)
            out = builds.add(builder, simd._vectors(builder, acc_), records, *ints, *data)
            return simd._tile(builder, out)

        given = acc, w, group, last, record, run, table, codes, scale, sums, tile
        return acc(*given), code

    return add_run


class Record:
    """The instructions of `add_run`, for records of certain fields: {name: (offset, type)}, `size` bytes."""

    def __init__(self, fields, size, groups, tokens, fine):
        self.fields, self.size, self.groups, self.tokens, self.fine = fields, size, groups, tokens, fine
        self.planes = [p for p in PLANE_BYTES if p in fields]
        self.runs = fields[self.planes[0]][1].shape[0]
        scales = fields["scale"][1].shape[0]
        self.halves = 2 if scales == 2 * self.runs else 1  # parts of a run that have scales of their own
        self.runs_a_scale = max(1, self.runs // scales)
        self.wide = "p8" in fields or "t4" in fields

    def add(self, builder, out, records, group, last, record, run, tile, w, table, codes, scale, sums):
        """The tile's vectors, with the run's products added."""
        table = _load(builder, table, 0, ir.VectorType(I8, 16))
        bases = []
        for i in range(self.groups):
            g = builder.add(group, I64(i))
            if i:
                g = builder.select(builder.icmp_signed("<", g, last), g, last)
            index = builder.add(builder.mul(g, records), record)
            bases.append(builder.gep(w, [builder.mul(index, I64(self.size))]))
        if self.tokens == 1:
            self.prefetch(builder, bases, records, record, run)
        runs = builder.mul(records, I64(self.runs))
        first = builder.add(builder.mul(record, I64(self.runs)), run)
        here = builder.add(builder.mul(tile, runs), first)  # of the runs of all tiles
        width = 4 * self.tokens  # bytes of a quad, or a number, of every token
        planes = 2 if self.fine else 1
        codes = builder.gep(codes, [builder.mul(here, I64(planes * 8 * width))])
        scale = builder.gep(scale, [builder.mul(here, I64(width))])
        sums = builder.gep(sums, [builder.mul(here, I64(self.halves * width))])
        i32, f32, v64 = ir.VectorType(I32, 16), ir.VectorType(F32, 16), ir.VectorType(I8, 64)
        for half in range(self.halves):
            starts = [_constant(i32, 0)] * self.tokens
            sums_here = [half * width + 4 * t for t in range(self.tokens)]
            if "offset" not in self.fields:
                starts = [_splat(builder, _load(builder, sums, at, I32)) for at in sums_here]
            low = [start for start in starts for _ in range(self.groups)]
            high = [_constant(i32, 0)] * len(low)
            for quad in range(8 // self.halves * half, 8 // self.halves * (half + 1)):
                for i, base in enumerate(bases):
                    operand = self.operand(builder, base, run, table, quad)
                    for plane, dots in enumerate((high, low) if self.fine else (low,)):
                        for t in range(self.tokens):
                            at = (plane * 8 + quad) * width + 4 * t
                            x = builder.bitcast(_splat(builder, _load(builder, codes, at, I32)), v64)
                            n = t * self.groups + i
                            dots[n] = _dot4(builder, dots[n], operand, x, self.wide)
                low = _keep(builder, low)
            if self.fine:
                high = [builder.shl(h, _constant(i32, 8)) for h in high]
                low = [builder.add(*pair) for pair in zip(high, low, strict=True)]
            of_scale = self.scale_of(builder, run, half)
            steps = [_splat(builder, _load(builder, scale, 4 * t, F32)) for t in range(self.tokens)]
            for i, base in enumerate(bases):
                d = self.numbers(builder, base, "scale", of_scale)
                for t in range(self.tokens):
                    n = t * self.groups + i
                    out[n] = _fma(builder, out[n], builder.sitofp(low[n], f32), builder.fmul(d, steps[t]))
                if "offset" in self.fields:
                    o = self.numbers(builder, base, "offset", of_scale)
                    for t, at in enumerate(sums_here):
                        n = t * self.groups + i
                        x = _splat(builder, _load(builder, sums, at, F32))
                        out[n] = _fma(builder, out[n], o, x)
        return out

    def prefetch(self, builder, bases, records, record, run):
        """Ask for what this run's bytes are to each group, AHEAD bytes further on, but no less than a record,
        for its planes are read side by side; past its end, the group goes on where the tile's next one,
        `groups` groups later, begins.
        """
        step = self.size // self.runs
        row = builder.mul(records, I64(self.size))
        in_record = builder.add(builder.mul(run, I64(step)), I64(max(AHEAD, self.size)))
        in_row = builder.add(builder.mul(record, I64(self.size)), in_record)
        past = builder.icmp_signed(">=", in_row, row)
        jump = builder.select(past, builder.mul(row, I64(self.groups - 1)), I64(0))
        at = builder.add(in_record, jump)
        for base in bases:
            for line in range(0, step, 64):
                _prefetch(builder, base, builder.add(at, I64(line)))

    def scale_of(self, builder, run, half):
        """Index in the record of the scale of (half) a run."""
        if self.halves == 2:
            return builder.add(builder.mul(run, I64(2)), I64(half))
        return run if self.runs_a_scale == 1 else builder.udiv(run, I64(self.runs_a_scale))

    def operand(self, builder, base, run, table, quad):
        """The codes of a quad, <64 x i8>, put together from the planes of the record at `base`."""
        v64 = ir.VectorType(I8, 64)
        code, shift = None, 0
        for name in self.planes:
            bits, vectors = int(name[1]), PLANE_BYTES[name] // 64
            at = builder.add(builder.mul(run, I64(PLANE_BYTES[name])), I64(64 * (quad % vectors)))
            part = _load(builder, builder.gep(base, [I64(self.fields[name][0])]), at, v64)
            if bits < 8:
                part = _field(builder, part, bits * (quad // vectors), shift, bits)
            code = part if code is None else builder.or_(code, part)
            shift += bits
        return _lookup(builder, table, code) if "t4" in self.planes else code

    def numbers(self, builder, base, name, index):
        """Sixteen scales or offsets of the record at `base`, as float32, times their unit."""

        def read(field, index):
            offset, kind = self.fields[field]
            at = builder.add(builder.mul(index, I64(16 * kind.dtype.bitwidth // 8)), I64(offset))
            return _load_f32(builder, base, at, kind.dtype)

        v = read(name, index)
        unit = {"scale": "unit", "offset": "offset_unit"}[name]
        return builder.fmul(v, read(unit, I64(0))) if unit in self.fields else v


add_run_one = _make_add_run(STREAMS, 1)
add_run_many = _make_add_run(GROUPS, TOKENS)


# What a thread takes at a time: a run of memory long enough for the processor to fetch ahead (a quarter of
# the speed of SmolLM2 against 16 KB), and some units for each thread, so that none waits long for another's
# last one.
UNIT_BYTES, UNITS_A_THREAD = 1 << 17, 3


@njit(nogil=True)
def unit_count(state, w, most):
    """Number of units that a matrix's groups of rows are cut into, `most` at most."""
    return min(most, max(w.nbytes // UNIT_BYTES, UNITS_A_THREAD * state[pool.THREADS]))


@njit(nogil=True)
def share(unit, units, count):
    """What a unit has of `count` things: the first, and the one after its last."""
    return count * unit // units, count * (unit + 1) // units


@njit(nogil=True)
def quantize_tokens(unit, x, codes, scale, sums, zero, given, shift):
    """Quantize the tokens of a tile; those that are not there become zeros, for arithmetic is slow on the
    smallest numbers, of which any memory is full.
    """
    for t in range(unit * TOKENS, min(unit * TOKENS + TOKENS, x.shape[0])):
        quantize_row(x, codes, scale, sums, zero, given, shift, t)
    for t in range(max(0, x.shape[0] - unit * TOKENS), TOKENS):
        scale[unit, :, t] = 0
        sums[unit, :, t] = 0


@njit(nogil=True)
def one_unit(unit, units, w, runs, table, codes, scale, sums, out, column):
    """The rows of a unit, for one token."""
    first, stop = share(unit, units, -(-w.shape[0] // STREAMS))
    last = w.shape[0] - 1
    for tile in range(first, stop):
        g = tile * STREAMS
        acc = zero_one()
        for r in range(w.shape[1]):
            for run in range(runs):
                acc = add_run_one(acc, w, g, last, r, run, table, codes, scale, sums, 0)
        simd.store_rows(out, column + 16 * g, 16, column + 16 * last, acc)


@kernel()
def one(state, w, runs, table, zero, x, given, shift, codes, scale, sums, out, column):
    """out[0, column:] = x Wᵀ for one token; w (groups, records) of `runs` runs, x f32 (1, cols), out f32; for
    given and shift see `quantize_row`.
    """
    quantize_row(x, codes, scale, sums, zero, given, shift, 0)
    units = unit_count(state, w, -(-w.shape[0] // STREAMS))
    job = pool.job(one_unit, (units, w, runs, table, codes, scale, sums, out, column))
    pool.run(state, units, job)


@njit(nogil=True)
def many_unit(unit, units, w, runs, table, codes, scale, sums, out, column):
    """The rows of a unit, for all tokens."""
    first, stop = share(unit, units, -(-w.shape[0] // GROUPS))
    last, width = w.shape[0] - 1, out.shape[1]
    for g in range(GROUPS * first, GROUPS * stop, GROUPS):
        for tile in range(out.shape[0] // TOKENS):
            acc = zero_many()
            for r in range(w.shape[1]):
                for run in range(runs):
                    acc = add_run_many(acc, w, g, last, r, run, table, codes, scale, sums, tile)
            simd.store_tile(out, tile * TOKENS * width + column + 16 * g, width, 16 * (last - g), acc)


@kernel()
def many(state, w, runs, table, zero, x, given, shift, codes, scale, sums, out, column):
    """out[:n, column:] = x Wᵀ for n tokens; codes, scale, sums and out have whole tiles of TOKENS rows."""
    job = pool.job(quantize_tokens, (x, codes, scale, sums, zero, given, shift))
    pool.run(state, out.shape[0] // TOKENS, job)
    units = unit_count(state, w, -(-w.shape[0] // GROUPS))
    job = pool.job(many_unit, (units, w, runs, table, codes, scale, sums, out, column))
    pool.run(state, units, job)


@njit(nogil=True)
def one_float_unit(unit, units, w, x, out, column):
    """The rows of a unit, for one token."""
    cols, ahead = w.shape[1], AHEAD // w.itemsize
    first, stop = share(unit, units, -(-w.shape[0] // STREAMS))
    last = w.shape[0] - 1
    for tile in range(first, stop):
        g = tile * STREAMS
        acc = zero_one()
        for k in range(cols):
            at, end = (g * cols + k) * 16, (last * cols + k) * 16
            simd.ask_rows(w, at + ahead, cols * 16, end + ahead, acc)
            rows = simd.load_rows(w, at, cols * 16, end, acc)
            acc = simd.fma(acc, rows, simd.splat(x[0, k]))
        simd.store_rows(out, column + 16 * g, 16, column + 16 * last, acc)


@kernel()
def one_float(state, w, x, out, column):
    """out[0, column:] = x Wᵀ for one token; w (groups, cols, 16), as `simd.kernel_view` has floats, x f32."""
    units = unit_count(state, w, -(-w.shape[0] // STREAMS))
    pool.run(state, units, pool.job(one_float_unit, (units, w, x, out, column)))


@njit(nogil=True)
def many_float_unit(unit, units, w, x, out, column):
    """The rows of a unit, for all tokens."""
    cols, last, width = w.shape[1], w.shape[0] - 1, out.shape[1]
    first, stop = share(unit, units, -(-w.shape[0] // GROUPS))
    for g in range(GROUPS * first, GROUPS * stop, GROUPS):
        for t in range(0, out.shape[0], TOKENS):
            acc = zero_many()
            for k in range(cols):
                at, end = (g * cols + k) * 16, (last * cols + k) * 16
                rows = simd.load_rows(w, at, cols * 16, end, zero_groups())
                acc = simd.outer(acc, rows, x, t * cols + k, cols)
            simd.store_tile(out, t * width + column + 16 * g, width, 16 * (last - g), acc)


@kernel()
def many_float(state, w, x, out, column):
    """out[:, column:] = x Wᵀ; x and out have whole tiles of TOKENS rows."""
    units = unit_count(state, w, -(-w.shape[0] // GROUPS))
    pool.run(state, units, pool.job(many_float_unit, (units, w, x, out, column)))
