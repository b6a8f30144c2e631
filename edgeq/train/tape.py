"""Reverse-mode differentiation of what a transformer computes; each operation has its gradient beside it.

    w = Var(np.ones((3, 4)))                gradients are wanted of what is a Var
    y = matmul(x, w)                        x is an array: a constant
    backward(total(y))
    w.grad

An operation takes Vars and arrays alike. Its result is a Var if one of them is, else an array: what does not
depend on any Var is computed as in NumPy, and nothing is kept. For each argument an operation states a
function from its result's gradient to the argument's. Only those of Vars are kept, and with them just the
arrays that they use, so frozen weights cost no memory for the inputs that their gradients would need.

All work in the dtype of their arguments: float32 to train, float64 to be checked.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np

from ..kernels.numpy_backend import ACTIVATIONS
from ..kernels.rope import rotate

Pull = Callable[[np.ndarray], np.ndarray]  # gradient of a result -> gradient of an argument
Numbers = Any  # Var or np.ndarray
NUMBER = count()
QUERIES = 64  # positions whose attention scores are in memory at once
ROWS = 32  # of a gate that are computed together, and stay in a core's cache


class Node:
    """Where the gradients of an array add up, and the ways on which they go back from there."""

    __slots__ = ("edges", "grad", "number")

    def __init__(self, edges: Sequence[tuple["Node", Pull]] = ()) -> None:
        self.edges, self.number = edges, next(NUMBER)  # numbers grow from arguments to results
        self.grad: np.ndarray | None = None


class Var:
    """An array that gradients are wanted of."""

    __slots__ = ("node", "value")

    def __init__(self, value: np.ndarray, edges: Sequence[tuple[Node, Pull]] = ()) -> None:
        self.value, self.node = value, Node(edges)

    @property
    def grad(self) -> np.ndarray | None:
        """The gradient, as far as it has come; `backward` leaves it on Vars that are no results."""
        return self.node.grad

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.value.shape

    def __len__(self) -> int:
        return len(self.value)

    def __mul__(self, factor: Any) -> "Var":
        return mul(self, factor)


def value(x: Numbers) -> np.ndarray:
    """The array itself."""
    return x.value if isinstance(x, Var) else x


def record(y: np.ndarray, *arguments: tuple[Numbers, Pull]) -> Numbers:
    """The result y of an operation, with the gradient of each argument that may be a Var."""
    edges = [(x.node, pull) for x, pull in arguments if isinstance(x, Var)]
    return Var(y, edges) if edges else y


def backward(y: Var, grad: np.ndarray | None = None) -> None:
    """Add to the gradient of every Var that y was made from; y is forgotten on the way.

    grad : gradient of y, as y; ones if not given.
    """
    y.node.grad = np.ones_like(y.value) if grad is None else grad
    found, waiting = {y.node.number: y.node}, [y.node]
    while waiting:
        for node, _ in waiting.pop().edges:
            if node.number not in found:
                found[node.number] = node
                waiting.append(node)
    for number in sorted(found, reverse=True):
        node = found.pop(number)
        if not node.edges:
            continue
        g, node.grad = node.grad, None
        assert g is not None
        edges, node.edges = list(node.edges), ()
        while edges:  # what an edge holds is let go before the next
            parent, pull = edges.pop()
            part = pull(g)
            parent.grad = part if parent.grad is None else parent.grad + part


def _as(g: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A gradient, summed over the axes along which x was broadcast."""
    g = g.sum(axis=tuple(range(g.ndim - x.ndim)))
    stretched = tuple(i for i, n in enumerate(x.shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=stretched, keepdims=True) if stretched else g


def add(x: Numbers, y: Numbers) -> Numbers:
    """x + y."""
    a, b = value(x), value(y)
    return record(a + b, (x, lambda g: _as(g, a)), (y, lambda g: _as(g, b)))


def mul(x: Numbers, y: Numbers) -> Numbers:
    """x * y."""
    a, b = value(x), value(y)
    return record(a * b, (x, lambda g: _as(g * b, a)), (y, lambda g: _as(g * a, b)))


def matmul(x: Numbers, w: Numbers) -> Numbers:
    """x @ wᵀ of x (n, cols), w (rows, cols) -> (n, rows)."""
    a, b = value(x), value(w)
    return record(a @ b.T, (x, lambda g: g @ b), (w, lambda g: g.T @ a))


def total(x: Numbers) -> Numbers:
    """The sum of all elements."""
    a = value(x)
    return record(a.sum(), (x, lambda g: np.broadcast_to(g, a.shape)))


def reshape(x: Numbers, *shape: int) -> Numbers:
    """x in another shape."""
    before = value(x).shape
    return record(value(x).reshape(shape), (x, lambda g: g.reshape(before)))


def part(x: Numbers, start: int, stop: int) -> Numbers:
    """x[:, start:stop]."""
    a = value(x)
    shape, dtype = a.shape, a.dtype

    def pull(g: np.ndarray) -> np.ndarray:
        whole = np.zeros(shape, dtype)
        whole[:, start:stop] = g
        return whole

    return record(a[:, start:stop], (x, pull))


def concatenate(parts: Sequence[Numbers]) -> Numbers:
    """Arrays (n, some, ...) side by side along their second axis."""
    arrays, edges, start = [value(p) for p in parts], [], 0
    for p, a in zip(parts, arrays, strict=True):
        at = slice(start, start := start + a.shape[1])
        edges.append((p, lambda g, at=at: g[:, at]))
    return record(np.concatenate(arrays, axis=1), *edges)


def add_columns(x: Numbers, start: int, y: Numbers) -> Numbers:
    """x (n, cols) with y (n, some) added to its columns from `start` on."""
    at = slice(start, start + value(y).shape[1])
    out = value(x).copy()
    out[:, at] += value(y)
    return record(out, (x, lambda g: g), (y, lambda g: g[:, at]))


def embedding(table: Numbers, ids: np.ndarray) -> Numbers:
    """Rows of a table (rows, cols), for ids (n,) -> (n, cols)."""
    t = value(table)

    def pull(g: np.ndarray) -> np.ndarray:
        grad = np.zeros_like(t)
        np.add.at(grad, ids, g)
        return grad

    return record(t[ids], (table, pull))


def rms_norm(x: Numbers, gain: Numbers, eps: float) -> Numbers:
    """x / sqrt(mean(x²) + eps) * gain over the last axis.

    With r = 1 / sqrt(mean(x²) + eps) and u = g * gain, dx = r (u - x r² mean(u x)).
    """
    a, b = value(x), value(gain)
    r = 1 / np.sqrt(np.mean(np.square(a), axis=-1, keepdims=True) + a.dtype.type(eps))

    def to_x(g: np.ndarray) -> np.ndarray:
        u = g * b
        inner = np.einsum("...i,...i->...", u, a)[..., None] * (np.square(r) / a.shape[-1])
        u -= a * inner
        u *= r
        return u

    return record(a * r * b, (x, to_x), (gain, lambda g: _as(g * (a * r), b)))


def _silu_slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Derivative of y = silu(x) = x s with s = sigmoid(x): s + y (1 - s)."""
    s = 1 / (1 + np.exp(np.minimum(-x, 88)))
    return s + y * (1 - s)


def _gelu_slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Derivative of y = gelu(x) = x s with s = sigmoid(2 u), u = c (x + k x³): s + 2 y (1 - s) du/dx."""
    c, k = x.dtype.type(np.sqrt(2 / np.pi)), x.dtype.type(0.044715)
    square = np.square(x)
    s = 1 / (1 + np.exp(np.minimum(-2 * c * x * (1 + k * square), 88)))
    return s + 2 * y * (1 - s) * (c * (1 + 3 * k * square))


SLOPES = {"silu": _silu_slope, "gelu": _gelu_slope}


def gated(gate_up: Numbers, activation: str) -> Numbers:
    """activation(gate) * up, of gate_up (n, 2 ffn) -> (n, ffn)."""
    a, f, slope = value(gate_up), ACTIVATIONS[activation], SLOPES[activation]
    half = a.shape[1] // 2
    blocks = [slice(start, start + ROWS) for start in range(0, len(a), ROWS)]

    def pull(g: np.ndarray) -> np.ndarray:
        grad = np.empty_like(a)
        for rows in blocks:
            gate, up = a[rows, :half], a[rows, half:]
            y = f(gate)
            np.multiply(g[rows], y, out=grad[rows, half:])
            up = g[rows] * up
            np.multiply(up, slope(gate, y), out=grad[rows, :half])
        return grad

    out = np.empty((len(a), half), a.dtype)
    for rows in blocks:
        np.multiply(f(a[rows, :half]), a[rows, half:], out=out[rows])
    return record(out, (gate_up, pull))


def rotary(x: Numbers, cos: np.ndarray, sin: np.ndarray, interleaved: bool, heads: int) -> Numbers:
    """The first heads of x (n, all heads, head_dim) turned by the angles (n, dims / 2) of their positions."""

    def turned(x: np.ndarray, sin: np.ndarray) -> np.ndarray:
        out = np.empty(x.shape, x.dtype)
        out[:, :heads] = rotate(x[:, :heads], cos, sin, interleaved)
        out[:, heads:] = x[:, heads:]
        return out

    return record(turned(value(x), sin), (x, lambda g: turned(g, -sin)))


def attention(
    qkv: Numbers, sequences: int, heads: int, kv_heads: int, scale: float, window: int = 0
) -> Numbers:
    """Causal attention of some sequences of the same length, one after the other.

    qkv (sequences * n, heads + 2 kv_heads, head_dim): queries, keys and values, turned by their positions.
    Returns (sequences * n, heads * head_dim). A token sees the `window` positions that end with its own, or
    all before if that is 0. The weights p are not kept, but made again from m, the logarithm of the sum that
    they were divided by (arXiv 2205.14135):

        p = exp(s q kᵀ - m)    dv = pᵀ dy    ds = p (dy vᵀ - Σ dy y)    dq = s ds k    dk = s dsᵀ q
    """
    a = value(qkv)
    n, dim, group = len(a) // sequences, a.shape[2], heads // kv_heads
    factor = a.dtype.type(scale)

    def by_head(x: np.ndarray) -> np.ndarray:
        """(sequences * n, some * kv_heads, head_dim) -> (sequences * kv_heads, n * some, head_dim), what
        belongs to a position together.
        """
        x = x.reshape(sequences, n, kv_heads, -1, dim).transpose(0, 2, 1, 3, 4)
        return np.ascontiguousarray(x.reshape(sequences * kv_heads, -1, dim))

    def back(x: np.ndarray) -> np.ndarray:
        """The inverse of `by_head`."""
        x = x.reshape(sequences, kv_heads, n, -1, dim).transpose(0, 2, 1, 3, 4)
        return x.reshape(sequences * n, -1, dim)

    def split(a: np.ndarray) -> list[np.ndarray]:
        return [by_head(x) for x in np.split(a, [heads, heads + kv_heads], axis=1)]

    def blocks() -> Any:
        """Rows of queries, the keys that one of them may see, and -inf for those that each does not."""
        for start in range(0, n, QUERIES):
            stop = min(start + QUERIES, n)
            first = max(start - window + 1, 0) if window else 0
            position, seen = np.arange(start, stop)[:, None], np.arange(first, stop)
            hidden = seen > position
            if window:
                hidden |= seen <= position - window
            mask = np.where(hidden, a.dtype.type(-np.inf), a.dtype.type(0)).repeat(group, axis=0)
            yield slice(start * group, stop * group), slice(first, stop), mask

    def scores(q: np.ndarray, k: np.ndarray, mask: np.ndarray) -> np.ndarray:
        s = (q * factor) @ k.swapaxes(1, 2)
        s += mask
        return s

    q, k, v = split(a)
    y = np.empty_like(q)
    logs = np.empty(q.shape[:2], a.dtype)
    for rows, keys, mask in blocks():
        p = scores(q[:, rows], k[:, keys], mask)
        top = p.max(axis=2)
        p -= top[..., None]
        np.exp(p, out=p)
        sums = p.sum(axis=2)
        np.matmul(p, v[:, keys], out=y[:, rows])
        y[:, rows] /= sums[..., None]
        logs[:, rows] = top + np.log(sums)
    out = back(y).reshape(len(a), -1)

    def pull(g: np.ndarray) -> np.ndarray:
        (q, k, v), dy = split(a), by_head(g.reshape(len(a), heads, dim))
        delta = np.einsum("hnd,hnd->hn", dy, by_head(out.reshape(len(a), heads, dim)))
        dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
        for rows, keys, mask in blocks():
            p = scores(q[:, rows], k[:, keys], mask)
            p -= logs[:, rows, None]
            np.exp(p, out=p)
            dv[:, keys] += p.swapaxes(1, 2) @ dy[:, rows]
            ds = dy[:, rows] @ v[:, keys].swapaxes(1, 2)
            ds -= delta[:, rows, None]
            ds *= p
            np.matmul(ds, k[:, keys], out=dq[:, rows])
            dk[:, keys] += ds.swapaxes(1, 2) @ q[:, rows]
        dq *= factor
        dk *= factor
        return np.concatenate([back(dq), back(dk), back(dv)], axis=1)

    return record(out, (qkv, pull))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    """log(softmax(x)) over the last axis."""
    x = x - x.max(axis=-1, keepdims=True)
    for row in x:  # which stays in a core's cache
        row -= np.log(np.exp(row).sum())
    return x


def cross_entropy(logits: Numbers, targets: np.ndarray, weights: np.ndarray) -> Numbers:
    """Σ weight * -log(softmax(logits)[target]), of logits (n, vocab), targets int (n,), weights (n,)."""
    logs, rows = _log_softmax(value(logits)), np.arange(len(targets))

    def pull(g: np.ndarray) -> np.ndarray:
        p = np.exp(logs)
        p[rows, targets] -= 1
        p *= (g * weights)[:, None]
        return p

    return record(-(logs[rows, targets] * weights).sum(), (logits, pull))


def divergence(logits: Numbers, teacher: np.ndarray, weights: np.ndarray) -> Numbers:
    """Σ weight * KL(softmax(teacher) ‖ softmax(logits)), of logits and teacher (n, vocab), weights (n,)."""
    logs, wanted = _log_softmax(value(logits)), _log_softmax(teacher)
    p = np.exp(wanted)

    def pull(g: np.ndarray) -> np.ndarray:
        return (np.exp(logs) - p) * (g * weights)[:, None]

    return record((np.einsum("ij,ij->i", p, wanted - logs) * weights).sum(), (logits, pull))


def straight_through(x: Numbers, y: np.ndarray) -> Numbers:
    """y, made from x by a step function, whose gradient is taken for that of x (arXiv 1308.3432)."""
    return record(y, (x, lambda g: g))


def recompute(f: Callable[[Numbers], Numbers], x: Numbers) -> Numbers:
    """f(x), of whose inner values none is kept: they are made again when the gradient comes (arXiv
    1604.06174).
    """
    a = value(x)
    y = f(a)
    if not isinstance(x, Var):
        if not isinstance(y, Var):
            return y
        x = Var(a)  # its gradient is of no use, but those of the Vars that f itself refers to come with it

    def pull(g: np.ndarray) -> np.ndarray:
        again = Var(a)
        backward(f(again), g)
        assert again.grad is not None
        return again.grad

    return record(value(y), (x, pull))
