"""The operations that `edgeq.arch` calls, recorded on the tape: the networks that run are those that learn.

A linear holds its weights in one of two ways, and whatever else can be called may stand in their place:

    Frozen      decoded, or as the file has them, to be decoded row by row where they are used; dx = dy W is
                all that goes back through it
    Trained     a Var for each tensor
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import arch, formats
from ..arch.weights import Progress, Weights
from ..kernels.heads import Heads
from ..kernels.rope import Rope
from ..tensor import Tensor
from . import tape
from .tape import Numbers, Var

PANEL = 1 << 20  # weights that are decoded together where they are not held


class Sequences(NamedTuple):
    """What attention asks of a cache: the length of a sequence, and the angles of each layer."""

    length: int
    ropes: Sequence[Rope]


class Frozen:
    """x @ Wᵀ with weights that do not change; W (rows, cols) is the rows of all tensors."""

    def __init__(self, tensors: Sequence[Tensor], hold: bool) -> None:
        self.tensors, self.rows = tensors, sum(t.rows for t in tensors)
        self.weight: np.ndarray | None = None
        if hold:
            w = np.empty((self.rows, tensors[0].cols), np.float32)
            for rows, panel in self.panels():
                w[rows] = panel
            self.weight = w

    def panels(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Some rows, and their weights."""
        if self.weight is not None:
            yield slice(None), self.weight
            return
        row = 0
        for t in self.tensors:
            step = max(1, PANEL // t.cols)
            for start in range(0, t.rows, step):
                stop = min(start + step, t.rows)
                yield slice(row + start, row + stop), formats.dequantize(t, start, stop)
            row += t.rows

    def __call__(self, x: Numbers) -> Numbers:
        a = tape.value(x)
        if self.weight is not None:
            return tape.matmul(x, self.weight)
        y = np.empty((len(a), self.rows), a.dtype)
        for rows, w in self.panels():
            y[:, rows] = a @ w.T
        return tape.record(y, (x, self.back))

    def back(self, g: np.ndarray) -> np.ndarray:
        """The gradient of x (n, cols), for that of y (n, rows)."""
        return sum(g[:, rows] @ w for rows, w in self.panels())


class Trained:
    """x @ Wᵀ with weights that learn, a Var or an array for each tensor."""

    def __init__(self, weights: Sequence[Numbers]) -> None:
        self.weights = list(weights)

    def __call__(self, x: Numbers) -> Numbers:
        return tape.concatenate([tape.matmul(x, w) for w in self.weights])


class Linear:
    """base(x) + b, and what adapters add to it.

    Attributes
    ----------
    names : of the tensors whose rows are stacked.
    rows : of each of them.
    base : x (n, cols) -> (n, all rows).
    biases : one for each tensor, an array or a Var (rows,), or none at all.
    adapters : first column, and what can be called for the columns from there on.
    """

    names: tuple[str, ...]

    def __init__(self, base: Any, tensors: Sequence[Tensor], bias: np.ndarray | None) -> None:
        self.base, self.rows, self.cols = base, [t.rows for t in tensors], tensors[0].cols
        self.biases: list[Numbers] = [] if bias is None else np.split(bias, self.starts[1:])
        self.adapters: list[tuple[int, Callable[[Numbers], Numbers]]] = []

    @property
    def starts(self) -> list[int]:
        """First row of each tensor."""
        return [0, *np.cumsum(self.rows[:-1]).tolist()]

    def __call__(self, x: Numbers) -> Numbers:
        y = self.base(x)
        if self.biases:
            y = tape.add(y, tape.concatenate([tape.reshape(b, 1, -1) for b in self.biases]))
        for start, adapter in self.adapters:
            y = tape.add_columns(y, start, adapter(x))
        return y


class Backend:
    """The functions of a backend (see ``edgeq.kernels``), and the Vars that they made.

    Parameters
    ----------
    trained : whether the tensor of that name learns.
    hold : keep frozen weights decoded, which takes 4 bytes for each and saves decoding them twice a step.

    Attributes
    ----------
    parameters : what learns, by the tensor's name.
    """

    def __init__(self, trained: Callable[[str], bool] = lambda name: False, *, hold: bool = True) -> None:
        self.trained, self.hold = trained, hold
        self.parameters: dict[str, Var] = {}

    def parameter(self, name: str, w: Callable[[], np.ndarray]) -> Numbers:
        """The weights of a tensor: a Var if it learns, the same for all who ask."""
        if not self.trained(name):
            return w()
        if name not in self.parameters:
            self.parameters[name] = Var(w())
        return self.parameters[name]

    def linear(
        self,
        tensors: Sequence[Tensor],
        bias: np.ndarray | None = None,
        *,
        batches: bool = True,
        release: Callable[[np.ndarray], None] = lambda data: None,
    ) -> Linear:
        """A matrix product with the rows of the tensors stacked."""
        base: Any
        if any(self.trained(t.name) for t in tensors):
            base = Trained([self.parameter(t.name, partial(formats.dequantize, t)) for t in tensors])
        else:
            base = Frozen(tensors, self.hold)
        if self.hold:
            for t in tensors:
                release(t.data)
        linear = Linear(base, tensors, bias)
        for i, b in enumerate(linear.biases):
            linear.biases[i] = self.parameter(tensors[i].name.removesuffix("weight") + "bias", b.copy)
        return linear

    def embedding(self, tensor: Tensor) -> Callable[[np.ndarray], Numbers]:
        """ids (n,) -> (n, cols): rows of the table."""
        if not self.trained(tensor.name):
            return lambda ids: formats.dequantize(formats.take(tensor, ids))
        table = self.parameter(tensor.name, lambda: formats.dequantize(tensor))
        return lambda ids: tape.embedding(table, ids)

    rms_norm = staticmethod(tape.rms_norm)
    add = staticmethod(tape.add)
    gated = staticmethod(tape.gated)

    @staticmethod
    def attention(qkv: Numbers, caches: Sequence[Sequences], layer: int, heads: Heads) -> Numbers:
        """Attend from each token of some sequences to itself and those before it."""
        n, (length, ropes) = len(caches), caches[0]
        cos, sin, interleaved = ropes[layer]
        cos, sin = (np.tile(a[:length], (n, 1)) for a in (cos, sin))
        turning = heads.heads + heads.kv_heads
        x = tape.reshape(qkv, n * length, turning + heads.kv_heads, heads.head_dim)
        if heads.q_norm is not None or heads.k_norm is not None:
            parts = [tape.part(x, 0, heads.heads), tape.part(x, heads.heads, turning)]
            for i, norm in enumerate((heads.q_norm, heads.k_norm)):
                if norm is not None:
                    parts[i] = tape.rms_norm(parts[i], norm, heads.eps)
            x = tape.concatenate([*parts, tape.part(x, turning, turning + heads.kv_heads)])
        x = tape.rotary(x, cos, sin, interleaved, turning)
        return tape.attention(x, n, heads.heads, heads.kv_heads, heads.scale, heads.window)


class LearningWeights(Weights):
    """Weights whose gains may learn."""

    def gain(self, name: str, size: int, plus: float = 0.0) -> Any:
        """The gains of a norm, (size,)."""
        return self.ops.parameter(name, lambda: super(LearningWeights, self).gain(name, size, plus))


class Network:
    """A network of `edgeq.arch` on the tape.

    Attributes
    ----------
    inner, module, config : what the architecture's module made, that module, and the shape.
    layers : of it, as they were made.
    parameters : what learns, by name.
    """

    def __init__(
        self,
        meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        path: object = "model",
        *,
        trained: Callable[[str], bool] = lambda name: False,
        hold: bool = True,
        again: bool = False,
        progress: Progress | None = None,
        release: Callable[[np.ndarray], None] = lambda data: None,
    ) -> None:
        """again : keep only what goes in and out of layers, and compute them again for the gradients."""
        self.module, meta, tensors = arch.identify(meta, tensors, path)
        backend: Any = Backend(trained, hold=hold)
        self.inner = self.module.network(meta, LearningWeights(tensors, backend, path, progress, release))
        self.config, self.layers = self.inner.config, self.inner.layers
        if again:
            self.inner.layers = [Again(layer) for layer in self.layers]
        self.parameters: dict[str, Var] = backend.parameters

    def linears(self) -> Iterator[Linear]:
        """All of them, layer by layer; the output matrix is the last."""
        for owner in (*self.layers, self.inner):
            yield from (linear for linear in vars(owner).values() if isinstance(linear, Linear))

    def hidden(self, ids: np.ndarray) -> Numbers:
        """What `head` makes logits of, (sequences * length, dim), for ids (sequences, length)."""
        n, length = ids.shape
        return self.inner.forward(
            self.inner.embed(ids.reshape(-1)), [Sequences(length, self.inner.ropes(length))] * n
        )

    def head(self, hidden: Numbers) -> Numbers:
        """Logits (n, vocab)."""
        return self.inner.head(hidden)


class Again:
    """A layer whose inner values are computed again for the gradients, instead of kept."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, x: Numbers, sequences: Sequence[Sequences]) -> Numbers:
        return tape.recompute(lambda x: self.layer(x, sequences), x)
