"""The forward pass in NumPy: float32 throughout, from the unpacked weights. Slow, exact, and the
specification of what the fast kernels compute.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import numpy as np

from .. import formats
from ..inputs import Inputs, rounded
from ..tensor import Tensor
from .cache import KVCache
from .heads import Heads
from .rope import rotate

CACHE_TYPES = ("f32", "f16", "q8_0")

dot = np.matmul  # of float32 matrices


def gram(x: np.ndarray) -> np.ndarray:
    """xᵀ x of inputs x float32 (n, cols)."""
    return x.T @ x


class Linear:
    """y = x @ Wᵀ + b with W float32 (rows, cols), x (n, cols), y (n, rows); W in parts, each with the way in
    which its x is rounded.
    """

    def __init__(self, parts: list[tuple[Inputs | None, np.ndarray]], bias: np.ndarray | None) -> None:
        self.parts, self.bias = parts, bias

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = np.concatenate([rounded(x, inputs) @ weight.T for inputs, weight in self.parts], axis=1)
        return y if self.bias is None else y + self.bias


def linear(
    tensors: Sequence[Tensor],
    bias: np.ndarray | None = None,
    *,
    batches: bool = True,
    release: Callable[[np.ndarray], None] = lambda data: None,
) -> Linear:
    """A matrix product with the rows of the tensors stacked; `batches` says that it will see many tokens at
    once, and `release` is told what bytes are not needed any more.
    """
    alike = groupby(tensors, key=lambda t: t.inputs)
    parts = [(inputs, np.concatenate([formats.dequantize(t) for t in some])) for inputs, some in alike]
    for t in tensors:
        release(t.data)
    return Linear(parts, bias)


def embedding(tensor: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    """ids (n,) -> float32 (n, cols): rows of the table, unpacked when they are needed."""
    return lambda ids: formats.dequantize(formats.take(tensor, ids))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x²) + eps) * weight over the last axis (arXiv 1910.07467)."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps)) * weight


def attention(qkv: np.ndarray, caches: Sequence[KVCache], layer: int, heads: Heads) -> np.ndarray:
    """Attend from new tokens to themselves and all before them, and store their keys and values.

    qkv float32 (n, (heads + 2 kv_heads) * head_dim): queries, keys and values of the tokens whose ids end
    `tokens` of the caches, equally many of each sequence, one sequence after the other. Returns float32 (n,
    heads * head_dim).
    """
    parts = np.split(qkv, len(caches))
    return np.concatenate([_attend(part, c, layer, heads) for part, c in zip(parts, caches, strict=True)])


def _attend(qkv: np.ndarray, cache: KVCache, layer: int, heads: Heads) -> np.ndarray:
    """`attention` of one sequence."""
    n, end = len(qkv), cache.length
    start = end - n
    rope = cache.ropes[layer]
    cos, sin = rope.cos[start:end], rope.sin[start:end]
    qkv = qkv.reshape(n, -1, heads.head_dim)
    q, k, v = np.split(qkv, [heads.heads, heads.heads + heads.kv_heads], axis=1)
    if heads.q_norm is not None:
        q = rms_norm(q, heads.q_norm, heads.eps)
    if heads.k_norm is not None:
        k = rms_norm(k, heads.k_norm, heads.eps)
    cache.write(layer, start, rotate(k, cos, sin, rope.interleaved), v)
    q = rotate(q, cos, sin, rope.interleaved)

    # query heads of one group share a key/value head: (kv_heads, n * group, head_dim)
    group = heads.heads // heads.kv_heads
    q = q.reshape(n, heads.kv_heads, group, -1).transpose(1, 0, 2, 3).reshape(heads.kv_heads, n * group, -1)
    scores = q @ cache.read_keys(layer, end).swapaxes(1, 2) * np.float32(heads.scale)
    position = np.repeat(np.arange(start, end), group)[:, None]
    seen = np.arange(end) <= position
    if heads.window:
        seen &= np.arange(end) > position - heads.window
    weights = softmax(np.where(seen, scores, -np.inf))
    y = weights @ cache.read_values(layer, end)
    return y.reshape(heads.kv_heads, n, group, -1).transpose(1, 0, 2, 3).reshape(n, -1)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis, safe for large x."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def add(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y."""
    return x + y


def low_rank(a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """f(x, y) = y + x aᵀ bᵀ, of a float32 (r, cols) and b float32 (rows, r); y may be overwritten."""
    return lambda x, y: y + x @ a.T @ b.T


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(np.minimum(-x, 88)))  # e**88 is the last that float32 holds


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of GELU (arXiv 1606.08415, section 2): 0.5 x (1 + tanh(u)) = x sigmoid(2 u)."""
    u = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
    return x / (1 + np.exp(np.minimum(-2 * u, 88)))


ACTIVATIONS = {"silu": silu, "gelu": gelu}


def gated(gate_up: np.ndarray, activation: str) -> np.ndarray:
    """activation(gate) * up, of gate_up (n, 2 ffn) -> (n, ffn) (arXiv 2002.05202)."""
    gate, up = np.split(gate_up, 2, axis=1)
    return ACTIVATIONS[activation](gate) * up


def again(
    caches: Sequence[KVCache], what: object, x: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """compute(x)."""
    return compute(x)


def ready(progress: Callable[[str, int, int], None] | None) -> None:
    """Nothing needs compiling."""


def computing(threads: int) -> AbstractContextManager[None]:
    """NumPy's threads are those of its BLAS library, which its own environment variables set."""
    return nullcontext()
