"""What is not codes learns, in all matrices of a transformer block together: the last phase of AQLM.

    minimize Σ ‖f'(x) - f(x)‖² / ‖f(x)‖²        f: the block as it was,  f': with ŵ = r s Σ_m C_m[code_m]

over codebooks C and a factor r of each row, by Adam; x are the inputs that f' has, behind blocks that have
learned already. Codebooks may be the best ones for each matrix, and are not so for the block: what one matrix
lost another can make up for, and where gate is small the error of up does not matter.

Source: Egiazarian et al., AQLM, arXiv 2401.06118, section 3, phase 3.

Differences from the authors' code: the error of a token is a part of the token's size, as the next norm will
see it, for a few tokens are a hundred times as large as the others. Norms stay as they are. The steps are
counted, and not ended by a validation text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import formats
from ..arch.weights import Progress
from ..convert.source import plain
from ..formats.aqlm import decode
from ..quantizers import Plan, layerwise
from ..quantizers.aqlm import scatter
from ..quantizers.layerwise import Calibration
from ..tensor import Tensor
from . import optim, tape
from .backend import Frozen, Linear, Network, Sequences
from .tape import Numbers, Var

RATE = 1e-3  # of Adam, for codebooks and factors, which are all about 1
BETAS = 0.9, 0.95
WARMUP = 0.05  # part of the steps in which the rate rises


class Coded:
    """x @ Ŵᵀ, of tensors in AQLM whose codes stay.

    Attributes
    ----------
    books, factors : what learns, of each tensor: float32 (codebooks, size, group) and (rows,).
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.codes = [formats.get("aqlm").codes(t).astype(np.int32) for t in tensors]
        self.scales = [t.parts["scale"].astype(np.float32) for t in tensors]
        self.books = [Var(t.parts["codebooks"].astype(np.float32)) for t in tensors]
        self.factors = [Var(np.ones_like(scale)) for scale in self.scales]

    def __call__(self, x: Numbers) -> Numbers:
        parts = zip(self.codes, self.books, self.scales, self.factors, strict=True)
        return tape.concatenate([tape.matmul(x, decoded(*part)) for part in parts])

    def encoded(self) -> list[Tensor]:
        """What a file gets."""
        parts = zip(self.tensors, self.codes, self.books, self.scales, self.factors, strict=True)
        return [
            formats.get("aqlm")
            .pack(codes, books.value.astype(np.float16), (scale * factor.value).astype(np.float16))
            ._replace(name=tensor.name)
            for tensor, codes, books, scale, factor in parts
        ]


def decoded(codes: np.ndarray, books: Var, scale: np.ndarray, factor: Var) -> Numbers:
    """Weights (rows, cols), of codes (rows, groups, codebooks)."""
    count, size, group = books.shape
    w = decode(codes, books.value, scale)
    of_rows = (scale * factor.value)[:, None]

    def to_books(g: np.ndarray) -> np.ndarray:
        g = (g * of_rows).reshape(-1, group)
        sums = [scatter(codes[:, :, m].reshape(-1), g, size) for m in range(count)]
        return np.stack(sums).astype(g.dtype)

    y = w * factor.value[:, None]
    return tape.record(y, (books, to_books), (factor, lambda g: np.einsum("ij,ij->i", g, w)))


class Block:
    """A layer as it was and as it is, whose matrices learn.

    old, new : layers of `Network.layers`; the linears of the new one are in AQLM.
    """

    def __init__(self, old: Any, new: Any, sequences: Sequence[Sequences]) -> None:
        self.old, self.new, self.sequences = old, new, sequences
        self.linears = [x for x in vars(new).values() if isinstance(x, Linear)]
        self.coded = [Coded(linear.base.tensors) for linear in self.linears]
        self.learned = {
            f"{i}.{j}": var for i, c in enumerate(self.coded) for j, var in enumerate((*c.books, *c.factors))
        }

    def learn(self, states: Sequence[np.ndarray], order: np.ndarray, rate: float) -> None:
        """Take a step for each number in the order, of a chunk's states float32 (n, dim)."""
        for linear, coded in zip(self.linears, self.coded, strict=True):
            linear.base = coded
        adam, weights = optim.AdamW(betas=BETAS), {name: var.value for name, var in self.learned.items()}
        for step, i in enumerate(order):
            wanted, y = self.old(states[i], self.sequences), self.new(states[i], self.sequences)
            tape.backward(y, (y.value - wanted) / np.square(wanted).sum(axis=1, keepdims=True))
            gradients = {name: var.grad for name, var in self.learned.items() if var.grad is not None}
            adam.step(weights, gradients, optim.rate(step, len(order), rate, round(WARMUP * len(order))))
            for var in self.learned.values():
                var.node.grad = None

    def freeze(self) -> dict[str, Tensor]:
        """Go on with what a file gets; its tensors, by name."""
        made = [coded.encoded() for coded in self.coded]
        for linear, tensors in zip(self.linears, made, strict=True):
            linear.base = Frozen(tensors, hold=False)
        return {t.name: t for tensors in made for t in tensors}


def tune(
    before: Plan,
    after: Plan,
    calibration: Calibration,
    *,
    steps: int,
    rate: float = RATE,
    progress: Progress | None = None,
) -> Plan:
    """The plan with codebooks and scales that have learned.

    Parameters
    ----------
    before, after : of a model, and of the same with all matrices of its layers in AQLM.
    calibration : the text, of which each step looks at a chunk.
    steps : of each block.
    rate : of Adam, at its highest.
    progress : called with ("tuning layers", those that are done, all of them).
    """
    windows = layerwise.windows_of(before, calibration, progress)
    was, now = (Network(plain(p.meta), layerwise.arranged(p), p.source, hold=False) for p in (before, after))
    sequences = [Sequences(windows.shape[1], now.inner.ropes(windows.shape[1]))]
    states = [tape.value(now.inner.embed(window)) for window in windows]
    rng = np.random.default_rng(calibration.seed)
    made: dict[str, Tensor] = {}
    for done, (old, new) in enumerate(zip(was.layers, now.layers, strict=True)):
        if progress:
            progress("tuning layers", done, len(now.layers))
        block = Block(old, new, sequences)
        turns = [rng.permutation(len(states)) for _ in range(-(-steps // len(states)))]
        block.learn(states, np.concatenate(turns)[:steps], rate)
        made |= block.freeze()
        states = [new(x, sequences) for x in states]
    if progress:
        progress("tuning layers", len(now.layers), len(now.layers))
    return layerwise.put(after, made)
