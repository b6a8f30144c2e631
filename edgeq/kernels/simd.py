"""Vector types for Numba, so that kernel code reads as vector code.

A Tile is rows of vectors of sixteen lanes, held in registers: the sixteen lanes are sixteen output rows (or
sixteen positions, or sixteen dimensions), and the rows of a tile are tokens that share what was loaded for
those. Operations are LLVM IR, written with llvmlite's builder inside `@intrinsic`; a tile is an array of
vectors to LLVM, which its optimizer takes apart into registers.

Functions with a leading underscore build IR and are called by other builders; the others are called from
kernels.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from . import host

LANES = 16
PATH = host.path()
FEATURES = host.features()
# what a byte of a wide plane stands for on this path: see `_dot4`
WIDE_BIAS = 128 if "vnni" in PATH.name else 0

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
ELEMENTS = {"i32": I32, "f32": F32}
CONTRACT = ("contract",)  # a product and a sum may become one fused instruction


class Tile(types.Type):
    """`rows` times `cols` vectors of sixteen i32 or f32; vector r * cols + c is column c of row r."""

    def __init__(self, elem: str, rows: int, cols: int = 1) -> None:
        self.elem, self.rows, self.cols, self.count = elem, rows, cols, rows * cols
        super().__init__(name=f"Tile({elem} x 16 x {rows} x {cols})")

    @property
    def vector(self) -> ir.VectorType:
        return ir.VectorType(ELEMENTS[self.elem], LANES)


@register_model(Tile)
class TileModel(models.PrimitiveModel):
    def __init__(self, manager, tile):
        super().__init__(manager, tile, ir.ArrayType(tile.vector, tile.count))


def kernel_view(array: np.ndarray) -> np.ndarray:
    """The array as kernels take it: Numba on the CPU knows no 16-bit floats, so float16 goes as int16,
    bfloat16 as uint16.
    """
    fields = array.dtype.fields
    if fields is None:
        return array.view(np.int16) if array.dtype == np.float16 else array
    swap = lambda d: np.dtype((np.int16, d.shape)) if d.base == np.float16 else d  # noqa: E731
    return array.view([(name, swap(kind)) for name, (kind, _) in fields.items()])


# ---- building blocks: Python values are LLVM values, and nothing is computed until LLVM compiles


def _call(builder, name, result, *args):
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _constant(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def _splat(builder, scalar, lanes=LANES):
    """The scalar in every lane."""
    vector = ir.VectorType(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(
        one, ir.Constant(vector, ir.Undefined), _constant(ir.VectorType(I32, lanes), 0)
    )


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def _pieces(builder, v, count):
    """A vector cut into `count` equal ones."""
    n = v.type.count // count
    return [
        _shuffle(builder, v, ir.Constant(v.type, ir.Undefined), range(i * n, i * n + n)) for i in range(count)
    ]


def _join(builder, parts):
    """Equal vectors, one after the other, as one; a power of two of them."""
    while len(parts) > 1:
        n = parts[0].type.count
        parts = [_shuffle(builder, a, b, range(2 * n)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _by_pieces(builder, bits, f, *vectors):
    """f applied to pieces of the vectors that are `bits` wide, the results joined."""
    v = vectors[0].type
    count = max(1, v.count * v.element.width // bits)
    cut = [_pieces(builder, v, count) if count > 1 else [v] for v in vectors]
    return _join(builder, [f(*piece) for piece in zip(*cut, strict=True)])


def _tile(builder, vectors):
    """Vectors gathered to a tile."""
    out = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for i, v in enumerate(vectors):
        out = builder.insert_value(out, v, i)
    return out


def _vectors(builder, tile, count=None):
    """A tile's vectors; a tile of one stands for `count` equal ones."""
    vectors = [builder.extract_value(tile, i) for i in range(tile.type.count)]
    return vectors * count if count and len(vectors) == 1 else vectors


def _data(context, builder, array_type, array):
    """Address of an array's first byte."""
    return builder.bitcast(context.make_array(array_type)(context, builder, array).data, I8.as_pointer())


def _load(builder, base, offset, kind):
    """The value of an LLVM type at a byte offset, which may be a Python int; unaligned."""
    offset = I64(offset) if isinstance(offset, int) else offset
    return builder.load(builder.bitcast(builder.gep(base, [offset]), kind.as_pointer()), align=1)


def _store(builder, base, offset, value):
    builder.store(value, builder.bitcast(builder.gep(base, [offset]), value.type.as_pointer()), align=1)


def _prefetch(builder, base, offset):
    """Ask for the cache line at a byte offset; it need not exist."""
    read, keep, data = I32(0), I32(3), I32(1)
    kind = ir.FunctionType(ir.VoidType(), [base.type, I32, I32, I32])
    f = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(f, [builder.gep(base, [offset]), read, keep, data])


def _fma(builder, acc, a, b):
    return builder.fadd(builder.fmul(a, b, flags=CONTRACT), acc, flags=CONTRACT)


def _keep(builder, vectors):
    """The same vectors, which LLVM must have in registers here: it may not put off what makes one of them
    until all is done for another, a chain of instructions that wait for each other.
    """
    if not PATH.bits:
        return vectors
    register = "w" if "arm" in PATH.name else "v" if PATH.bits == 512 else "x"
    pieces = [p for v in vectors for p in _pieces(builder, v, 512 // PATH.bits)]
    out = ir.LiteralStructType([p.type for p in pieces])
    constraints = [f"={register}"] * len(pieces) + [str(i) for i in range(len(pieces))]
    kind = ir.FunctionType(out, [p.type for p in pieces])
    kept = builder.asm(kind, "", ",".join(constraints), pieces, True)
    kept = [builder.extract_value(kept, i) for i in range(len(pieces))]
    each = len(pieces) // len(vectors)
    return [_join(builder, kept[i : i + each]) for i in range(0, len(kept), each)]


def _widen(builder, v):
    """float16 lanes as float32."""
    wide = ir.VectorType(F32, v.type.count)
    if PATH.half:
        return builder.fpext(v, wide)
    # exponent and fraction moved to their places, the exponent's bias mended by a multiplication; inf stays
    # inf
    bits = builder.zext(
        builder.bitcast(v, ir.VectorType(I16, v.type.count)), i32 := ir.VectorType(I32, v.type.count)
    )
    magnitude = builder.and_(bits, _constant(i32, 0x7FFF))
    number = builder.bitcast(builder.shl(magnitude, _constant(i32, 13)), wide)
    number = builder.bitcast(builder.fmul(number, _constant(wide, 2.0**112)), i32)
    special = builder.icmp_unsigned(">=", magnitude, _constant(i32, 0x7C00))
    number = builder.select(special, builder.or_(number, _constant(i32, 0x7F800000)), number)
    sign = builder.shl(builder.and_(bits, _constant(i32, 0x8000)), _constant(i32, 16))
    return builder.bitcast(builder.or_(number, sign), wide)


def _load_f32(builder, base, offset, dtype):
    """Sixteen numbers at a byte offset, as float32; of a type of `kernel_view`, or small integers."""
    dtype = np.dtype(dtype if isinstance(dtype, type) else str(dtype))
    f32, i32 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
    if dtype == np.float32:
        return _load(builder, base, offset, f32)
    if dtype == np.int16:
        return _widen(builder, _load(builder, base, offset, ir.VectorType(F16, LANES)))
    if dtype == np.uint16:
        bits = builder.zext(_load(builder, base, offset, ir.VectorType(I16, LANES)), i32)
        return builder.bitcast(builder.shl(bits, _constant(i32, 16)), f32)
    extend = {"u1": builder.zext, "i1": builder.sext}[dtype.str[1:]]
    return builder.sitofp(extend(_load(builder, base, offset, ir.VectorType(I8, LANES)), i32), f32)


def _dot4(builder, acc, w, x, wide, path=PATH):
    """acc[lane] += Σ of four products w · x, of the lane's four bytes; acc <16 x i32>, w and x <64 x i8>, x
    signed.

    A narrow w is unsigned and at most 127. A wide w is a byte biased by 128, and the product is of w - 128,
    except with VNNI, whose instruction wants w unsigned: there it is of w itself, and WIDE_BIAS tells the
    caller.
    """
    signed = lambda v: builder.xor(v, _constant(v.type, -128))  # noqa: E731
    if "vnni" in path.name:
        # LLVM up to 21 declares the bytes as i32, later versions upgrade that form by themselves
        lanes = ir.VectorType(I32, path.bits // 32)
        dot = lambda acc, w, x: _call(builder, f"llvm.x86.avx512.vpdpbusd.{path.bits}", lanes, acc, w, x)  # noqa: E731
        w, x = (builder.bitcast(v, acc.type) for v in (w, x))
        return _by_pieces(builder, path.bits, dot, acc, w, x)
    if path.name == "avx2":
        i8, i16, i32 = ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I32, 8)

        def dot(w, x):
            if wide:  # |w| and x with w's sign: pairs stay below 2 * 128 * 127, no saturation
                w = signed(w)
                minus = builder.icmp_signed("<", w, _constant(i8, 0))
                x = builder.select(minus, builder.sub(_constant(i8, 0), x), x)
                w = builder.select(minus, builder.sub(_constant(i8, 0), w), w)
            pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", i16, w, x)
            return _call(builder, "llvm.x86.avx2.pmadd.wd", i32, pairs, _constant(i16, 1))

        return builder.add(acc, _by_pieces(builder, 256, dot, w, x))
    if wide:
        w = signed(w)
    if path.name == "arm-dotprod":
        parts = zip(_pieces(builder, acc, 4), _pieces(builder, w, 4), _pieces(builder, x, 4), strict=True)
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return _join(builder, [_call(builder, name, a.type, a, b, c) for a, b, c in parts])
    for byte in range(4):
        pick = range(byte, 4 * LANES, 4)
        a, b = (builder.sext(_shuffle(builder, v, v, pick), acc.type) for v in (w, x))
        acc = builder.add(acc, builder.mul(a, b))
    return acc


def _field(builder, v, start, to, count):
    """v <64 x i8> with `count` bits of every byte, from bit `start` on, moved to bit `to`, the others zero.

    One instruction with GFNI, a product with a matrix of bits, of which LLVM makes two.
    """
    kept = _constant(v.type, ((1 << count) - 1) << to)
    if start == to:
        return builder.and_(v, kept)
    if "gfni" in FEATURES and PATH.bits in (256, 512):
        rows = [1 << (bit - to + start) if to <= bit < to + count else 0 for bit in range(8)]
        matrix = ir.Constant(v.type, rows[::-1] * (v.type.count // 8))
        name = f"llvm.x86.vgf2p8affineqb.{PATH.bits}"
        product = lambda v, matrix: _call(builder, name, v.type, v, matrix, I8(0))  # noqa: E731
        return _by_pieces(builder, PATH.bits, product, v, matrix)
    move = builder.lshr if start > to else builder.shl
    return builder.and_(move(v, _constant(v.type, abs(start - to))), kept)


def _lookup(builder, table, codes):
    """table[code] of every lane; table <16 x i8>, codes <64 x i8> below 16."""
    if "arm" in PATH.name:
        find = lambda c: _call(builder, "llvm.aarch64.neon.tbl1.v16i8", c.type, table, c)  # noqa: E731
        return _by_pieces(builder, 128, find, codes)
    if not PATH.bits:
        out = _constant(codes.type, 0)
        for i in range(16):
            entry = _splat(builder, builder.extract_element(table, I32(i)), codes.type.count)
            out = builder.select(builder.icmp_unsigned("==", codes, _constant(codes.type, i)), entry, out)
        return out
    name = "llvm.x86.avx512.pshuf.b.512" if PATH.bits == 512 else "llvm.x86.avx2.pshuf.b"
    tables = _shuffle(builder, table, table, list(range(16)) * (PATH.bits // 128))
    return _by_pieces(builder, PATH.bits, lambda c: _call(builder, name, c.type, tables, c), codes)


def _exp(builder, x):
    """e**x in float32, relative error below 2e-7; results below 2**-126 become 0.

    x = n ln 2 + r with |r| <= ln 2 / 2; e**r by its Taylor polynomial of degree 7, 2**n through the exponent
    bits.
    """
    f32, i32 = x.type, ir.VectorType(I32, LANES)
    c = lambda value: _constant(f32, float(np.float32(value)))  # noqa: E731
    x = _call(builder, "llvm.minnum.v16f32", f32, x, c(88.3))
    x = _call(builder, "llvm.maxnum.v16f32", f32, x, c(-87.9))
    n = _call(builder, "llvm.rint.v16f32", f32, builder.fmul(x, c(1.4426950408889634)))
    r = _fma(builder, x, n, c(-0.693359375))  # ln 2 in two parts, so that the subtraction is exact
    r = _fma(builder, r, n, c(2.12194440e-4))
    p = c(1 / 5040)
    for k in (720, 120, 24, 6, 2, 1, 1):
        p = _fma(builder, c(1 / k), p, r)
    power = builder.shl(builder.add(builder.fptosi(n, i32), _constant(i32, 127)), _constant(i32, 23))
    return builder.fmul(p, builder.bitcast(power, f32))


# ---- what kernels call


def make_zero(rows, cols=1):
    """A function that gives a float32 tile of zeros."""
    tile = Tile("f32", rows, cols)

    @intrinsic
    def zero(typing):
        nothing = ir.Constant(ir.ArrayType(tile.vector, tile.count), None)
        return tile(), lambda context, builder, sig, args: nothing

    return zero


def _elementwise(build):
    """An operation on tiles, vector by vector; a tile of one combines with every vector of the others."""

    def types_and_code(*tiles):
        out = max(tiles, key=lambda t: t.count)
        count = out.count

        def code(context, builder, sig, args):
            columns = zip(*(_vectors(builder, a, count) for a in args), strict=True)
            return _tile(builder, [build(builder, *c) for c in columns])

        return out(*tiles), code

    return types_and_code


_add_code = _elementwise(lambda b, x, y: b.fadd(x, y))
_mul_code = _elementwise(lambda b, x, y: b.fmul(x, y))
_div_code = _elementwise(lambda b, x, y: b.fdiv(x, y))
_fma_code = _elementwise(_fma)
_exp_code = _elementwise(_exp)
_max_code = _elementwise(lambda b, x, y: _call(b, "llvm.maxnum.v16f32", x.type, x, y))


@intrinsic
def add(typing, x, y):
    """x + y"""
    return _add_code(x, y)


@intrinsic
def mul(typing, x, y):
    """x * y"""
    return _mul_code(x, y)


@intrinsic
def div(typing, x, y):
    """x / y"""
    return _div_code(x, y)


@intrinsic
def fma(typing, acc, x, y):
    """acc + x * y"""
    return _fma_code(acc, x, y)


@intrinsic
def exp(typing, x):
    """e**x"""
    return _exp_code(x)


@intrinsic
def maximum(typing, x, y):
    """The larger of x and y."""
    return _max_code(x, y)


@intrinsic
def splat(typing, value):
    """A float32 in every lane."""
    return Tile("f32", 1)(types.float32), lambda c, b, sig, args: _tile(b, [_splat(b, args[0])])


@intrinsic
def load(typing, array, index):
    """The sixteen elements of a contiguous array from `index` on, as float32; see `kernel_view` for 16-bit
    types.
    """
    dtype = np.dtype(str(array.dtype))

    def code(context, builder, sig, args):
        offset = builder.mul(context.cast(builder, args[1], sig.args[1], types.intp), I64(dtype.itemsize))
        return _tile(builder, [_load_f32(builder, _data(context, builder, array, args[0]), offset, dtype)])

    return Tile("f32", 1)(array, index), code


@intrinsic
def store(typing, array, index, stride, tile):
    """Row r of the tile into the elements from `index + r * stride` on; array float32, or f16 as int16."""
    half = array.dtype == types.int16

    def code(context, builder, sig, args):
        base = _data(context, builder, array, args[0])
        index, stride = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 2))
        for i, v in enumerate(_vectors(builder, args[3])):
            r, c = divmod(i, tile.cols)
            at = builder.add(index, builder.add(builder.mul(stride, I64(r)), I64(LANES * c)))
            v = builder.fptrunc(v, ir.VectorType(F16, LANES)) if half else v
            _store(builder, base, builder.mul(at, I64(2 if half else 4)), v)
        return context.get_dummy_value()

    return types.void(array, index, stride, tile), code


@intrinsic
def store_tile(typing, array, index, stride, last, tile):
    """What `store` does, with no column further than `last` numbers behind the first: those that would be
    must equal the one there.
    """

    def code(context, builder, sig, args):
        base = _data(context, builder, array, args[0])
        index, stride, last = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 2, 3))
        for i, v in enumerate(_vectors(builder, args[4])):
            r, c = divmod(i, tile.cols)
            across = I64(LANES * c)
            if c:
                across = builder.select(builder.icmp_signed("<", across, last), across, last)
            at = builder.add(index, builder.add(builder.mul(stride, I64(r)), across))
            _store(builder, base, builder.mul(at, I64(4)), v)
        return context.get_dummy_value()

    return types.void(array, index, stride, last, tile), code


@intrinsic
def store_one(typing, array, index, value):
    """A float32 into one element of a contiguous array of float32, or float16 as int16."""

    def code(context, builder, sig, args):
        value = builder.fptrunc(args[2], F16) if array.dtype == types.int16 else args[2]
        at = builder.mul(
            context.cast(builder, args[1], sig.args[1], types.intp), I64(array.dtype.bitwidth // 8)
        )
        _store(builder, _data(context, builder, array, args[0]), at, value)
        return context.get_dummy_value()

    return types.void(array, index, types.float32), code


def _strided(context, builder, ints, args, tile, itemsize):
    """Byte offsets of a tile's vectors: a row each `stride` elements from `index` on, none past `last`."""
    index, stride, last = (context.cast(builder, a, t, types.intp) for a, t in zip(args, ints, strict=True))
    for r in range(tile.rows):
        at = builder.add(index, builder.mul(stride, I64(r)))
        if r:
            at = builder.select(builder.icmp_signed("<", at, last), at, last)
        for c in range(tile.cols):
            yield builder.mul(builder.add(at, I64(LANES * c)), I64(itemsize))


@intrinsic
def load_rows(typing, array, index, stride, last, like):
    """A tile shaped as `like`: row r is the elements from `index + r * stride` on, as float32; the row at
    `last` stands for those further on.
    """
    dtype = np.dtype(str(array.dtype))

    def code(context, builder, sig, args):
        base = _data(context, builder, array, args[0])
        offsets = _strided(context, builder, sig.args[1:4], args[1:4], like, dtype.itemsize)
        return _tile(builder, [_load_f32(builder, base, at, dtype) for at in offsets])

    return like(array, index, stride, last, like), code


@intrinsic
def ask_rows(typing, array, index, stride, last, like):
    """Ask for the cache lines where rows begin that `load_rows` will load; the array may end before."""

    def code(context, builder, sig, args):
        base = _data(context, builder, array, args[0])
        for at in _strided(context, builder, sig.args[1:4], args[1:4], like, array.dtype.bitwidth // 8):
            _prefetch(builder, base, at)
        return context.get_dummy_value()

    return types.void(array, index, stride, last, like), code


@intrinsic
def store_rows(typing, array, index, stride, last, tile):
    """Store what `load_rows` loads; array float32. Rows past `last` must equal the one there."""

    def code(context, builder, sig, args):
        base = _data(context, builder, array, args[0])
        offsets = _strided(context, builder, sig.args[1:4], args[1:4], tile, 4)
        for at, v in zip(offsets, _vectors(builder, args[4]), strict=True):
            _store(builder, base, at, v)
        return context.get_dummy_value()

    return types.void(array, index, stride, last, tile), code


@intrinsic(prefer_literal=True)
def load_field(typing, records, index, field, element):
    """Sixteen numbers of an array in record `index`, from `element` on, as float32."""
    name, kind = field.literal_value, records.dtype.typeof(field.literal_value).dtype

    def code(context, builder, sig, args):
        index, element = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 3))
        at = builder.add(builder.mul(index, I64(records.dtype.size)), I64(records.dtype.offset(name)))
        at = builder.add(at, builder.mul(element, I64(kind.bitwidth // 8)))
        return _tile(builder, [_load_f32(builder, _data(context, builder, records, args[0]), at, kind)])

    return Tile("f32", 1)(records, index, field, element), code


@intrinsic
def to_half(typing, value):
    """A float32 as float16, in the bits of an int16."""
    code = lambda c, builder, sig, args: builder.bitcast(builder.fptrunc(args[0], F16), I16)  # noqa: E731
    return types.int16(types.float32), code


@intrinsic
def from_half(typing, bits):
    """The float32 of a float16 in the bits of an int16."""

    def code(context, builder, sig, args):
        lanes = _splat(builder, builder.bitcast(args[0], F16))
        return builder.extract_element(_widen(builder, lanes), I32(0))

    return types.float32(types.int16), code


@intrinsic
def outer(typing, acc, v, array, index, stride):
    """acc[r, c] + v[0, c] * array[index + r * stride]: what is in v's lanes times the number of each row."""

    def code(context, builder, sig, args):
        base = _data(context, builder, array, args[2])
        index, stride = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (3, 4))
        vectors, out = _vectors(builder, args[1]), _vectors(builder, args[0])
        for r in range(acc.rows):
            at = builder.mul(builder.add(index, builder.mul(stride, I64(r))), I64(4))
            x = _splat(builder, _load(builder, base, at, F32))
            for c, v in enumerate(vectors):
                out[r * acc.cols + c] = _fma(builder, out[r * acc.cols + c], v, x)
        return _tile(builder, out)

    return acc(acc, v, array, index, stride), code


def _reduction(name):
    def types_and_code(tile):
        def code(context, builder, sig, args):
            (v,) = _vectors(builder, args[0])
            start = [F32(0.0)] if name == "fadd" else []
            kind = ir.FunctionType(F32, [*(s.type for s in start), v.type])
            f = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{name}.v16f32")
            return builder.call(f, [*start, v], fastmath=("reassoc",))

        return types.float32(tile), code

    return types_and_code


_sum_code, _largest_code = _reduction("fadd"), _reduction("fmax")


@intrinsic
def total(typing, tile):
    """Sum of a vector's lanes."""
    return _sum_code(tile)


@intrinsic
def largest(typing, tile):
    """Largest of a vector's lanes."""
    return _largest_code(tile)


@intrinsic
def magnitude(typing, tile):
    """|x|"""
    code = _elementwise(lambda b, x: _call(b, "llvm.fabs.v16f32", x.type, x))
    return code(tile)


@intrinsic
def code_limit(typing, codes):
    """The largest code that an array of activation codes holds: 127 for int8, 127 * 256 for int16."""
    limit = 127 if codes.dtype == types.int8 else 127 * 256
    return types.int64(codes), lambda context, builder, sig, args: I64(limit)


@intrinsic
def store_codes(typing, codes, run, quad, tokens, token, tile):
    """Round sixteen lanes to activation codes, store them as four quads of a token, and return their sum.

    codes, int8 or int16, is laid out as activations.py describes; run: of the runs of all tiles; quad: the
    first; tokens: of a tile; token: in its tile.
    """
    fine = codes.dtype == types.int16

    def code(context, builder, sig, args):
        (v,) = _vectors(builder, args[5])
        i32, quads = ir.VectorType(I32, LANES), ir.VectorType(I32, 4)
        run, quad, tokens, token = (
            context.cast(builder, args[i], sig.args[i], types.intp) for i in range(1, 5)
        )
        base = _data(context, builder, codes, args[0])
        q = builder.fptosi(_call(builder, "llvm.rint.v16f32", v.type, v), i32)
        planes = [q]
        if fine:
            half = builder.icmp_unsigned("==", builder.and_(q, _constant(i32, 255)), _constant(i32, 128))
            q = builder.add(q, builder.zext(half, i32))
            high = builder.ashr(builder.add(q, _constant(i32, 127)), _constant(i32, 8))
            planes = [high, builder.sub(q, builder.shl(high, _constant(i32, 8)))]
        for p, plane in enumerate(planes):
            four = builder.bitcast(builder.trunc(plane, ir.VectorType(I8, LANES)), quads)
            first = builder.add(builder.mul(run, I64(8 * len(planes))), builder.add(quad, I64(8 * p)))
            for i in range(4):
                place = builder.add(builder.mul(builder.add(first, I64(i)), tokens), token)
                value = builder.extract_element(four, I32(i))
                _store(builder, base, builder.mul(place, I64(4)), value)
        return _call(builder, "llvm.vector.reduce.add.v16i32", I32, q)

    return types.int32(codes, run, quad, tokens, token, tile), code
