"""The forward pass on compiled kernels: integer products on prepared lanes, a float16 cache."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from .. import formats
from ..grid import inverse
from ..inputs import Inputs
from ..tensor import Tensor
from . import (
    activations,
    amx,
    attention_amx,
    codebooks,
    elementwise,
    jit,
    lowrank,
    matmul,
    matmul_amx,
    numpy_backend,
    pool,
    scratch,
    simd,
)  # fmt: skip
from . import attention as attention_kernel
from . import product as products
from .cache import KVCache
from .heads import Heads
from .jit import Entry, Kernel, Progress, compile_all
from .lanes import PLANE_BYTES, ROWS, RUN, Lanes
from .matmul import TOKENS
from .pool import computing as computing
from .prepare import prepare
from .program import Program, replay
from .rope import rope
from .simd import kernel_view

# of keys and values, the usual one first; without instructions for float16 there are neither that nor scales
CACHE_TYPES = ("f16", "f32", "q8_0") if simd.PATH.half else ("f32",)
# kernels that the prepared matrices will run, and those that every model runs
WANTED: set[Entry] = set()
EMPTY = np.zeros(0, np.float32)
# a @ b of float32 matrices that are not kept, as calibration and training have them
dot = products.dot if simd.PATH.amx else np.matmul
# xᵀ x of inputs, where there is a matrix unit of numbers that are rounded for it
gram = products.gram if simd.PATH.amx else numpy_backend.gram
# fewer tokens than this take 16-bit activations (see activations.py), as many or more the matrix unit where
# there is one (see amx.py), which is then the faster way, else 8-bit activations
FINE_TOKENS = 32 if simd.PATH.amx else 128


def whole(n: int) -> int:
    """Of how many tokens the tiles are in a product of n."""
    return 1 if n == 1 else amx.PAIR if simd.PATH.amx and n >= FINE_TOKENS else TOKENS


def is_ternary(lanes: Lanes) -> bool:
    """Whether the codes are 0, 1 and 2, of which 1 stands for zero, without offsets."""
    names = lanes.data.dtype.names
    return [n for n in names if n in PLANE_BYTES] == ["p2"] and "offset" not in names and lanes.zero == 1


class Product:
    """x Wᵀ for one prepared matrix, written into columns of a wider output.

    order : int (cols,), which column of W each of its columns is, if they are not in their own order: then x
        is brought into it first.
    inputs : how x is rounded; what a zero point adds to y is left to the bias.
    """

    def __init__(self, lanes: Lanes, order: np.ndarray | None = None, inputs: Inputs | None = None) -> None:
        self.rows, self.cols, self.is_float = lanes.rows, lanes.cols, lanes.is_float
        self.order = None if order is None else np.ascontiguousarray(order, np.int32)
        self.w = kernel_view(lanes.data)
        self.width = len(self.w) * ROWS
        state = pool.state()
        x, out = np.zeros((1, lanes.cols), np.float32), np.zeros((1, 16), np.float32)
        if lanes.is_float:
            self.one = matmul.one_float.entry(state, self.w, x, out, 0)
            self.many = self.coarse = matmul.many_float.entry(state, self.w, x, out, 0)
            if simd.PATH.amx:
                self.coarse = matmul_amx.many_float.entry(state, self.w, x, self.tiles(0), out, 0)
            return
        self.rule, self.bound = activations.rule(inputs), inputs is not None
        names = lanes.data.dtype.names
        self.record_runs = lanes.data.dtype[next(p for p in PLANE_BYTES if p in names)].shape[0]
        self.runs = self.w.shape[1] * self.record_runs
        self.halves = max(1, lanes.data.dtype["scale"].shape[0] // self.record_runs)
        self.sums = np.float32 if "offset" in names else np.int32
        self.table = lanes.table
        self.zero = np.int32(simd.WIDE_BIAS if "p8" in names or "t4" in names else lanes.zero)
        # ternary models are trained with activations of 8 bits, the others notice them
        self.codes = np.int8 if self.bound or is_ternary(lanes) else np.int16
        fixed = state, self.w, self.record_runs, self.table, self.zero, x
        self.one = matmul.one.entry(*fixed, *self.rule, *self.scratch(1, self.codes), out, 0)
        self.many = matmul.many.entry(*fixed, *self.rule, *self.scratch(1, self.codes), out, 0)
        if self.bound:
            self.coarse = self.many
        elif simd.PATH.amx:
            self.coarse = matmul_amx.many.entry(*fixed, self.tiles(0), out, 0)
        else:
            self.coarse = matmul.many.entry(*fixed, *self.rule, *self.scratch(1, np.int8), out, 0)

    def tiles(self, n: int) -> np.ndarray:
        """Room for n tokens, whole tiles, as the matrix unit takes them; in halves where they are split."""
        parts = (2, -(-self.cols // amx.COLS)) if self.is_float else (self.runs,)
        return scratch.empty((n // amx.ROWS, *parts, amx.ROWS, amx.COLS // 2)).view(np.int16)

    def scratch(self, n: int, codes: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Room for the codes, scales and sums of n quantized tokens, one or whole tiles."""
        tokens = 1 if n == 1 else TOKENS
        return (
            np.empty((n, self.runs * RUN), codes),
            np.empty((n // tokens, self.runs, tokens), np.float32),
            np.empty((n // tokens, self.runs * self.halves, tokens), self.sums),
        )

    def __call__(self, x: np.ndarray, out: np.ndarray, column: int) -> None:
        """x f32 (n, cols); out f32 (n rounded up to a tile, width or more), from `column` on."""
        if self.order is not None:
            gathered = scratch.empty(x.shape)
            elementwise.gather(pool.state(), x, self.order, gathered)
            x = gathered
        if self.is_float:
            if simd.PATH.amx and len(x) >= FINE_TOKENS:
                self.coarse(pool.state(), self.w, x, self.tiles(len(out)), out, column)
                return
            if len(out) != len(x):
                padded = scratch.empty((len(out), self.cols))
                elementwise.add(pool.state(), x, np.zeros((1, self.cols), np.float32), padded[: len(x)])
                x = padded
            (self.one if len(x) == 1 else self.many)(pool.state(), self.w, x, out, column)
            return
        fixed = pool.state(), self.w, self.record_runs, self.table, self.zero, x
        if len(x) < FINE_TOKENS or self.bound:
            f = self.one if len(x) == 1 else self.many
            f(*fixed, *self.rule, *self.scratch(len(out), self.codes), out, column)
        elif simd.PATH.amx:
            self.coarse(*fixed, self.tiles(len(out)), out, column)
        else:
            self.coarse(*fixed, *self.rule, *self.scratch(len(out), np.int8), out, column)


class Linear:
    """y = x @ Wᵀ + b on prepared lanes, x f32 (n, cols), y f32 (n, rows)."""

    def __init__(self, products: "list[Product | codebooks.Product]", bias: np.ndarray | None) -> None:
        self.products = products
        self.rows, self.cols = sum(p.rows for p in products), products[0].cols
        # a product writes whole sixteens of rows; the next one, or the cut at the end, takes the excess away
        ends = np.cumsum([p.rows for p in products])
        self.width = max(end - p.rows + p.width for end, p in zip(ends, products, strict=True))
        self.plain = bias is None
        self.bias = np.zeros((1, self.rows), np.float32) if bias is None else bias.reshape(1, -1)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, np.float32)  # kernels take what they are given for just that
        n, cols = x.shape
        if cols != self.cols:
            raise ValueError(f"expected {self.cols} columns, found {cols}")
        y = scratch.empty((-(-n // (tile := whole(n))) * tile, self.width))
        column = 0
        for product in self.products:
            product(x, y, column)
            column += product.rows
        if self.plain and (n == 1 or self.rows == self.width):
            return y[:n, : self.rows]
        return add(y, self.bias, n)


def linear(
    tensors: Sequence[Tensor],
    bias: np.ndarray | None = None,
    *,
    batches: bool = True,
    release: Callable[[np.ndarray], None] = lambda data: None,
) -> Linear:
    """A matrix product with the rows of the tensors stacked; neighbours that allow it become one matrix.

    `batches` says that it will see many tokens at once, so that the kernels for them are compiled ahead, too;
    `release` is told what bytes are not needed any more.
    """
    stacks: list[list[Tensor]] = []
    for t in tensors:
        if stacks and alike(stacks[-1][-1], t) and stacks[-1][-1].rows % ROWS == 0:
            stacks[-1].append(t)
        else:
            stacks.append([t])
    bias = shifted(tensors, bias)
    products = [product(stack, release) for stack in stacks]
    for p in products:
        WANTED.update([p.one, p.many] if batches else [p.one])
        if isinstance(p, Product) and p.order is not None:
            WANTED.add(elementwise.gather.fixed)
    return Linear(products, bias)


def product(stack: Sequence[Tensor], release: Callable[[np.ndarray], None]) -> Product | codebooks.Product:
    """The product with the stacked rows of tensors that are alike."""
    if stack[0].format in formats.VECTORS:
        return codebooks.Product(stack[0], release)
    return Product(prepare(stack, release), stack[0].order, stack[0].inputs)


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether rows of the two can be rows of one matrix."""
    if a.format != b.format or a.format in formats.VECTORS or a.parts.keys() != b.parts.keys():
        return False
    if a.inputs != b.inputs or any(a.parts[key].shape[1:] != b.parts[key].shape[1:] for key in a.parts):
        return False
    if a.order is None or b.order is None:
        return a.order is b.order
    return np.array_equal(a.order, b.order)


def shifted(tensors: Sequence[Tensor], bias: np.ndarray | None) -> np.ndarray | None:
    """The bias float32 (rows,), less what zero points of the inputs make of codes."""
    if not any(t.inputs and t.inputs.zero for t in tensors):
        return bias
    sums = []
    for t in tensors:
        _, scale, zero = t.inputs or activations.ANY
        sums.append(formats.dequantize(t).sum(axis=1, dtype=np.float64) * (scale * zero))
    less = np.concatenate(sums)
    return ((0 if bias is None else bias) - less).astype(np.float32)


def embedding(tensor: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """ids (n,) -> float32 (n, cols): rows of the table, unpacked when they are needed."""
    return lambda ids: formats.dequantize(formats.take(tensor, ids))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x²) + eps) * weight of every row."""
    out = scratch.empty(x.shape)
    elementwise.rms_norm(pool.state(), x, weight, np.float32(eps), out)
    return out


def add(x: np.ndarray, y: np.ndarray, rows: int | None = None) -> np.ndarray:
    """x + y, of the first rows of x; y may be one row for all."""
    out = scratch.empty((len(x) if rows is None else rows, y.shape[1]))
    elementwise.add(pool.state(), x, y, out)
    return out


def low_rank(a: np.ndarray, b: np.ndarray) -> lowrank.LowRank:
    """f(x, y) = y + x aᵀ bᵀ, of a float32 (r, cols) and b float32 (rows, r); y may be overwritten."""
    tall = np.sqrt(np.abs(b).max(axis=0) * inverse(np.abs(a).max(axis=1)))[:, None]
    matrices = []
    for w in (a * tall, b * inverse(tall).T):  # equally tall: then float16 holds both
        w = np.ascontiguousarray(w, np.float16 if simd.PATH.half else np.float32)
        matrices.append(Tensor("", f"f{8 * w.itemsize}", w.shape, w.reshape(-1).view(np.uint8)))
    pair = lowrank.LowRank(*(linear([t]) for t in matrices), add)
    WANTED.add(pair.one)
    return pair


def attention(qkv: np.ndarray, caches: Sequence[KVCache], layer: int, heads: Heads) -> np.ndarray:
    """Attend from new tokens to themselves and all before them, and store their keys and values."""
    n = len(qkv) // len(caches)
    out = scratch.empty((len(qkv), heads.heads, heads.head_dim))
    for i, sequence in enumerate(caches):
        part = slice(i * n, i * n + n)
        kernel, arguments = attention_call(qkv[part], sequence, layer, heads, out[part])
        attention_entry(kernel, *sequence.types)(*arguments)
    return out.reshape(len(qkv), -1)


def attention_call(
    qkv: np.ndarray, sequence: KVCache, layer: int, heads: Heads, out: np.ndarray
) -> tuple[Kernel, tuple[object, ...]]:
    """The kernel for the new tokens of one sequence, and what it takes."""
    turn, n = sequence.ropes[layer], len(qkv)
    sequence.starts[0] = sequence.length - n
    keys, values = kernel_view(sequence.keys[layer]), kernel_view(sequence.values[layer])
    q_norm, k_norm = (EMPTY if norm is None else norm for norm in (heads.q_norm, heads.k_norm))
    arguments = (
        pool.state(), qkv.reshape(-1), keys, values, turn.cos, turn.sin, turn.interleaved, q_norm, k_norm,
        np.float32(heads.eps), np.float32(heads.scale), heads.window, sequence.starts,
        scratch.empty(out.shape),
    )  # fmt: skip
    if simd.PATH.amx and n >= FINE_TOKENS and heads.head_dim % amx.COLS == 0:
        return attention_amx.attention, (*arguments, out)
    shape = attention_kernel.scratch(n, heads, sequence.capacity)
    return attention_kernel.attention, (
        *arguments, *(scratch.empty(s) for s in (shape, shape[:2], shape[:2])), out,
    )  # fmt: skip


@cache
def attention_entry(kernel: Kernel, key_type: str, value_type: str) -> Entry:
    """The kernel for caches of these types."""
    n = FINE_TOKENS if kernel is attention_amx.attention else 1
    tiny = KVCache(n, 1, RUN, [rope(n, 2, 1.0, interleaved=True)], key_type, value_type)
    tiny.tokens.extend([0] * n)
    qkv, out = np.zeros((n, 3 * RUN), np.float32), np.zeros((n, 1, RUN), np.float32)
    return kernel.entry(*attention_call(qkv, tiny, 0, Heads(1, 1, RUN, 1.0), out)[1])


def gated(gate_up: np.ndarray, activation: str) -> np.ndarray:
    """activation(gate) * up, of gate_up (n, 2 ffn) -> (n, ffn)."""
    out = scratch.empty((len(gate_up), gate_up.shape[1] // 2))
    f = {"silu": elementwise.silu_gate, "gelu": elementwise.gelu_gate}[activation]
    f(pool.state(), gate_up, out)
    return out


def again(
    caches: Sequence[KVCache], what: object, x: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """compute(x), `what` it is being known: recorded the second time, and from then on done without Python.

    x float32 (n, dim) belongs to new tokens of the caches, equally many of each. The programs are kept with
    the first cache.
    """
    starts = [sequence.starts for sequence in caches]
    key = (what, id(pool.state()), *map(id, starts))
    programs = caches[0].programs
    if key not in programs:
        programs[key] = starts  # which keeps their ids theirs
        return compute(x)
    program = programs[key]
    if not isinstance(program, Program):
        programs[key] = program = Program(compute, x)
        return program.out.copy()
    for sequence in caches:
        sequence.starts[0] = sequence.length - len(x) // len(caches)
    return program(x).copy()


def ready(progress: Progress | None) -> None:
    """Compile what the prepared matrices will run, and report what is compiled later on, too."""
    jit.listener = progress
    attention_kernels = [attention_kernel.attention] + [attention_amx.attention] * simd.PATH.amx
    common = (
        pool.work.fixed,
        replay.fixed,
        elementwise.rms_norm.fixed,
        elementwise.add.fixed,
        *(attention_entry(kernel, CACHE_TYPES[0], CACHE_TYPES[0]) for kernel in attention_kernels),
        elementwise.silu_gate.fixed,
        elementwise.gelu_gate.fixed,
    )
    compile_all([*WANTED, *common], progress)
    WANTED.clear()


def want_everything() -> None:
    """Let `ready` compile the kernels of every format, by preparing a small matrix of each."""
    for name in formats.names():
        cols = 2 * max(formats.get(name).BLOCK, RUN)
        data = np.zeros(ROWS * formats.row_bytes(name, cols), np.uint8)
        parts = {"scale": np.zeros(ROWS, np.float32)} if formats.parts(formats.get(name)) else {}
        product = Product(prepare([Tensor(name, name, (ROWS, cols), data, parts)]))
        WANTED.update((product.one, product.many, product.coarse))
