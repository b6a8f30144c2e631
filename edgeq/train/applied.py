"""Adapters on a model that runs: the pairs of all of them beside each linear, on the model's own backend.

    y = W x + b + B A x        A: the rows of all pairs stacked, B: their scaled columns, each beside its rows

The weights stay as they are, so adapters come and go without loading the model again.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .. import arch
from ..arch import Model
from .adapter import check, read
from .lora import Adapter

Path = str | os.PathLike[str]
Adapters = Path | tuple[Path, float] | Sequence[Path | tuple[Path, float]]

Scaled = tuple[Adapter, float]


class Adapted:
    """A linear with pairs beside it.

    Attributes
    ----------
    linear, names, shapes : the linear itself, and its tensors.
    """

    def __init__(self, linear: Any, ops: Any, adapters: Sequence[Scaled]) -> None:
        self.linear, self.ops = linear, ops
        self.names, self.shapes = linear.names, linear.shapes
        rows = sum(shape[0] for shape in self.shapes)
        inputs, outputs = [], []
        start, shift = 0, np.zeros(rows, np.float32)
        for name, (height, _) in zip(self.names, self.shapes, strict=True):
            at = slice(start, start := start + height)
            bias = name.removesuffix("weight") + "bias"
            for adapter, factor in adapters:
                if name in adapter.pairs:
                    a, b, scale = adapter.pairs[name]
                    wide = np.zeros((rows, len(a)), np.float32)
                    wide[at] = b * np.float32(scale * factor)
                    inputs.append(a)
                    outputs.append(wide)
                if bias in adapter.biases:
                    change = adapter.biases[bias] - np.reshape(linear.bias, -1)[at]
                    shift[at] += np.float32(factor) * change
        self.pairs = self.shift = None
        if inputs:
            self.pairs = ops.low_rank(np.concatenate(inputs), np.concatenate(outputs, axis=1))
        if shift.any():
            self.shift = shift[None]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = self.linear(x)
        if self.shift is not None:
            y = self.ops.add(y, self.shift)
        return y if self.pairs is None else self.pairs(x, y)


def places(model: Model) -> Iterator[tuple[Any, str, Any]]:
    """Owner, attribute and linear of all that adapters may stand beside."""
    for owner in (*model.network.layers, model.network):
        for name, linear in vars(owner).items():
            if hasattr(linear, "shapes"):
                yield owner, name, linear.linear if isinstance(linear, Adapted) else linear


def load(model: Model, adapters: Adapters) -> None:
    """Read adapters, each a path or a path and a scale, and `apply` them; an empty list takes all away."""
    one = isinstance(adapters, str | os.PathLike) or (
        isinstance(adapters, tuple) and len(adapters) == 2 and isinstance(adapters[1], int | float)
    )
    several: Any = [adapters] if one else adapters
    pairs = [(x, 1.0) if isinstance(x, str | os.PathLike) else x for x in several]
    module = arch.module(model.config.name)
    apply(model, [(p, read(pathlib.Path(p), module, model.config), float(scale)) for p, scale in pairs])


def apply(model: Model, adapters: Sequence[tuple[object, Adapter, float]]) -> None:
    """Put adapters, (name for messages, adapter, scale) each, in the place of those that were there.

    Raises
    ------
    FormatError : when one belongs to another model; then nothing changes.
    """
    found = list(places(model))
    shapes = {n: s for _, _, f in found for n, s in zip(f.names, f.shapes, strict=True)}
    biased = {n for _, _, f in found if f.bias is not None for n in f.names}
    for path, adapter, _ in adapters:
        check(path, adapter, shapes | {n.removesuffix("weight") + "bias": shapes[n][:1] for n in biased})
    scaled = [(adapter, scale) for _, adapter, scale in adapters if scale]
    changed = {n for adapter, _ in scaled for n in adapter.pairs}
    changed |= {n.removesuffix("bias") + "weight" for adapter, _ in scaled for n in adapter.biases}
    with arch.turn(model.ops, model.threads):
        made = [
            Adapted(linear, model.ops, scaled) if changed & {*linear.names} else linear
            for _, _, linear in found
        ]
        model.ops.ready(None)
        for (owner, name, _), linear in zip(found, made, strict=True):
            setattr(owner, name, linear)
