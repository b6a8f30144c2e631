"""Ternary weights after training: -1, 0 and 1, times a scale for some columns of a row.

    minimize Σ h_j (w_j - s q_j)²        q_j = sign(w_j) where |w_j| > s / 2, else 0
    s = Σ_k h_j |w_j| / Σ_k h_j          over the k largest weights: those that do not become 0

For a number k of weights that are kept, s is the mean of their magnitudes, and (Σ_k h |w|)² / Σ_k h is what
the error becomes smaller by. All k are tried: a sum that runs down the sorted weights has them all. The
paper's threshold, 0.7 times the mean magnitude, is what that gives for normally distributed weights, about
(`formats.ternary.threshold`).

Then `feedback` lets the weights that are not yet rounded make up for the errors of those that are, by GPTQ's
rule, h_j being what it costs; without it h_j = 1.

Models that are good with such weights were trained with them. One that was not loses most of what it knew:
tools/LOG.md has the figures.

Source: Li and Liu, Ternary Weight Networks, arXiv 1605.04711, Equations 2 to 6.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .. import formats, uniform
from ..formats.ternary import LEVELS
from ..grid import Grid, decode, encode, inverse
from ..tensor import Tensor
from . import integers, layerwise
from .gptq import gptq
from .objective import error
from .target import Target

if TYPE_CHECKING:
    from . import Plan
    from .layerwise import Calibration, Found

Progress = Callable[[str, int, int], None]
GROUP = 64  # columns that share a scale


def ternary(
    plan: "Plan",
    calibration: "Calibration",
    progress: Progress | None = None,
    found: "Found | None" = None,
    *,
    group: int = GROUP,
    feedback: bool = True,
    damp: float = 0.01,
) -> "Plan":
    """All matrices of the layers with three values, stored as integers of 2 bits.

    Parameters
    ----------
    plan, calibration, progress, found : as in `layerwise.apply`.
    group : columns that share a scale, a multiple of 32.
    feedback : round with GPTQ, which looks at a text.
    damp : as in `gptq.gptq`.
    """
    target = Target("ternary", group, partial(fit, group=group))
    return few_values(plan, calibration, progress, found, target, feedback, damp)


def fit(w: np.ndarray, importance: np.ndarray | None = None, *, group: int = GROUP) -> Grid:
    """The grid of w float32 (rows, cols) with the least error, weighted by importance (cols,) or as w."""
    magnitude = np.abs(w).reshape(len(w), -1, group)
    h = np.broadcast_to(1 if importance is None else importance, w.shape).reshape(magnitude.shape)
    order = np.argsort(-magnitude, axis=2, kind="stable")
    magnitude, h = (np.take_along_axis(v, order, axis=2).astype(np.float64) for v in (magnitude, h))
    mass, kept = np.cumsum(h * magnitude, axis=2), np.cumsum(h, axis=2)
    k = np.argmax(mass**2 * inverse(kept), axis=2)[:, :, None]
    s = np.take_along_axis(mass, k, axis=2) * inverse(np.take_along_axis(kept, k, axis=2))
    return Grid(LEVELS, s[:, :, 0].astype(np.float32))


def few_values(
    plan: "Plan",
    calibration: "Calibration",
    progress: Progress | None,
    found: "Found | None",
    target: Target,
    feedback: bool,
    damp: float,
) -> "Plan":
    """All matrices of the layers on the grids of a target whose values are -1, 0 and 1 times a scale."""
    made: dict[str, Tensor] = {}
    if not feedback:
        for tensor, w in integers.matrices(plan):
            grid = target.fit(_grouped(tensor.name, w, target), None)
            made[tensor.name] = as_two_bits(tensor.name, encode(w, grid), grid)
        return layerwise.put(plan, made)
    for linear, inputs in layerwise.inputs_of(plan, calibration, progress):
        for name, w in linear.parts():
            codes, grid = gptq(_grouped(name, w, target), inputs.hessian, target, damp=damp, order="groups")
            made[name] = as_two_bits(name, codes, grid)
            decoded = formats.dequantize(made[name])
            if found:
                found(name, error(w, decoded, inputs.hessian))
            w[:] = decoded
    return layerwise.put(plan, made)


def _grouped(name: str, w: np.ndarray, target: Target) -> np.ndarray:
    """The weights, if they are whole groups."""
    if target.width % 32 or w.shape[1] % target.width:
        raise ValueError(
            f"tensor {name}: {w.shape[1]} columns in groups of {target.width}, expected whole ones, of a "
            "multiple of 32"
        )
    return w


def as_two_bits(name: str, codes: np.ndarray, grid: Grid) -> Tensor:
    """Integers of 2 bits that stand for the same: -1, 0 and 1 are three of their four values."""
    to = uniform.grid_of(2, grid.scale if grid.offset is None else -grid.offset, None)
    return formats.pack("i2", encode(decode(codes, grid), to), to)._replace(name=name)
