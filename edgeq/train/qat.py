"""Quantization-aware training: a network learns with the weights that its file will hold.

    W' = decode(encode(W))     dW = dW'         (straight through, arXiv 1308.3432)

by a format's own fit, encode and decode, or kernels that do the same to the bit, so what is trained is what
`exported` gives. Options:

    mean           ternary scales that are the mean magnitude of a group, as in BitNet b1.58 (arXiv
                   2402.17764), also for formats whose own fit covers the largest weight
    steps          scales that learn (LSQ, arXiv 1902.08153). Of q = W / s, clipped to the levels,
                   ds = Σ dW' (round(q) - q), or the level where q is beyond, over √(group · top level)
    activations    inputs rounded to 8 bits, a scale for each token

and, as the loss, the divergence from what the network was before (`Teacher`).
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from .. import formats
from ..grid import Grid, decode, encode, inverse
from ..inputs import Inputs
from ..kernels.encode import choose as nearest
from ..quantizers.ternary import as_two_bits
from ..tensor import Tensor
from . import tape
from .backend import Network, Trained
from .data import Batch
from .tape import Numbers, Var

Choose = Callable[[ModuleType, np.ndarray, np.ndarray | None], tuple[np.ndarray, Any]]


def mean(module: ModuleType, w: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, Grid]:
    """Ternary codes and grid of w (rows, cols): the scale of a block, or row, is its mean magnitude."""
    blocks = w if formats.parts(module) else w.reshape(-1, module.BLOCK)
    stored = np.dtype(np.float32 if formats.parts(module) else "<f2")
    scale = np.abs(blocks).mean(axis=1, keepdims=True).astype(stored)
    grid = Grid(module.LEVELS[:3], scale)
    return encode(blocks, grid), grid


class Fake:
    """x @ decode(encode(W))ᵀ, a Var W for each tensor.

    Attributes
    ----------
    format, choose : of the codes.
    grids, steps : with scales that learn, for each tensor its grid and the scales that take the place of the
        grid's own; else empty.
    activations : whether inputs are rounded, too.
    """

    def __init__(self, weights: list[Numbers], format: str, choose: Choose, activations: bool) -> None:
        self.weights, self.format, self.choose, self.activations = weights, format, choose, activations
        self.grids: list[Grid] = []
        self.steps: list[Var] = []

    def learn_steps(self) -> list[Var]:
        """Let the scales learn, from what the format's encoder takes at first."""
        module = formats.get(self.format)
        for w in map(tape.value, self.weights):
            grid = formats.of_rows(self.choose(module, w, None)[1], len(w))
            if grid is None or grid.offset is not None or grid.scale_steps is not None:
                raise ValueError(f"scales of {self.format} cannot learn: it has offsets, or scales of scales")
            self.grids.append(grid)
            self.steps.append(Var(np.maximum(np.abs(grid.scale.astype(np.float32)), np.float32(1e-8))))
        return self.steps

    def grid(self, i: int) -> Grid:
        """A tensor's grid, with the scales that were learned as the file can store them."""
        return self.grids[i]._replace(scale=self.steps[i].value.astype(self.grids[i].scale.dtype))

    def encoded(self, i: int) -> Tensor:
        """The tensor that a file gets."""
        w = tape.value(self.weights[i])
        if not self.steps:
            return formats.quantize(self.format, w, choose=self.choose)
        return formats.pack(self.format, encode(w, self.grid(i)), self.grid(i))

    def decoded(self, i: int) -> Numbers:
        """What the file's tensor decodes to."""
        w = self.weights[i]
        if not self.steps:
            codes, grid = self.choose(formats.get(self.format), tape.value(w), None)
            if grid is None:  # floats, which are rounded as they are packed
                return tape.straight_through(w, formats.dequantize(self.encoded(i)))
            return tape.straight_through(w, decode(codes, grid).reshape(w.shape))
        grid = self.grid(i)
        return learned_step(w, self.steps[i], decode(encode(tape.value(w), grid), grid), grid.levels)

    def __call__(self, x: Numbers) -> Numbers:
        if self.activations:
            x = rounded(x)
        return tape.concatenate([tape.matmul(x, self.decoded(i)) for i in range(len(self.weights))])


def learned_step(w: Numbers, step: Var, y: np.ndarray, levels: np.ndarray) -> Numbers:
    """y, the weights (rows, cols) decoded with scales step (rows, groups), with LSQ's gradients."""
    a, s = tape.value(w), step.value
    q = a.reshape(*s.shape, -1) * inverse(s)[..., None]
    low, high = a.dtype.type(levels.min()), a.dtype.type(levels.max())
    inside = (q >= low) & (q <= high)
    slope = np.where(inside, y.reshape(q.shape) * inverse(s)[..., None] - q, np.clip(q, low, high))
    share = a.dtype.type((q.shape[-1] * max(high, 1)) ** -0.5)
    return tape.record(
        y,
        (w, lambda g: g * inside.reshape(g.shape)),
        (step, lambda g: (g.reshape(slope.shape) * slope).sum(axis=-1) * share),
    )


def rounded(x: Numbers) -> Numbers:
    """x (n, cols) in 8 bits, with a scale for each row that covers its largest number."""
    a = tape.value(x)
    scale = np.abs(a).max(axis=1, keepdims=True) / a.dtype.type(127)
    return tape.straight_through(x, np.rint(a * inverse(scale)) * scale)


def attach(
    network: Network,
    format: str,
    *,
    choose: Choose = nearest,
    steps: bool = False,
    activations: bool = False,
) -> dict[str, Var]:
    """Let the linears of a network's layers, which must learn, compute with quantized weights; returns the
    scales that learn, by name.
    """
    learned: dict[str, Var] = {}
    for linear in network.linears():
        if linear.names[0].startswith("blk."):
            assert isinstance(linear.base, Trained)
            formats.row_bytes(format, linear.cols)  # raises for what the format cannot hold
            linear.base = Fake(linear.base.weights, format, choose, activations)
            if steps:
                names = [f"{name}.scale" for name in linear.names]
                learned |= dict(zip(names, linear.base.learn_steps(), strict=True))
    return learned


def exported(network: Network) -> dict[str, Tensor]:
    """The tensors that learned, by name: those of the layers' linears in their format, the others f32."""
    made = {}
    for name, var in network.parameters.items():
        w = np.ascontiguousarray(var.value)
        made[name] = Tensor(name, "f32", w.shape, w.reshape(-1).view(np.uint8))
    for linear in network.linears():
        if isinstance(linear.base, Fake):
            made |= {n: linear.base.encoded(i)._replace(name=n) for i, n in enumerate(linear.names)}
    return made


def as_integers(tensor: Tensor, *, activations: bool) -> Tensor:
    """An exported tensor as a folder holds it: ternary and binary weights as integers of 2 bits, which lose
    nothing, and a word on inputs where they were rounded.
    """
    if tensor.format in ("ternary", "binary"):
        codes, grid = formats.unpack(tensor)
        assert grid is not None
        tensor = as_two_bits(tensor.name, codes, grid)
    return tensor._replace(inputs=Inputs("token")) if activations and tensor.parts else tensor


class Teacher:
    """A loss: how far the logits are from those of another network.

    Parameters
    ----------
    network : the other, which does not learn.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.hidden = np.zeros((0, 0), np.float32)

    def begin(self, batch: Batch) -> None:
        """Compute what the loss of a batch needs."""
        self.hidden = tape.value(self.network.hidden(batch.ids))

    def __call__(
        self, logits: Numbers, targets: np.ndarray, weights: np.ndarray, rows: np.ndarray
    ) -> Numbers:
        return tape.divergence(logits, tape.value(self.network.head(self.hidden[rows])), weights)
