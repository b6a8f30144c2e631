"""SmoothQuant: move what makes inputs hard to round into the weights, which are easier.

    y = (X diag(s)⁻¹) (diag(s) Wᵀ)        s_j = max|x_j|^α / max|w_j|^(1 - α)

A few columns of X reach a hundred times as far as the others, for all tokens, and one scale for X serves
these alone. Divided by s they reach as far as the columns of W then do; α says how much of the way. Whoever
computes X, a norm or another linear layer, divides by s, so the model is a plain one, and computes what it
did.

Source: Xiao et al., SmoothQuant, arXiv 2211.10438, Equations 3 and 4.

Differences from the authors' code: there only norms divide, here also the matrices that make the inputs of
attn_output and ffn_down, by their rows (`linears`). Where several heads of queries share the values of one,
their columns share a scale, as in `awq.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..observers import make
from . import integers, layerwise

if TYPE_CHECKING:
    from . import Plan
    from .layerwise import Calibration, Found

Progress = Callable[[str, int, int], None]
LEAST = 1e-5  # of a magnitude, and of s


def smooth(
    plan: "Plan",
    calibration: "Calibration",
    progress: Progress | None = None,
    found: "Found | None" = None,
    *,
    alpha: float = 0.5,
    linears: bool = True,
) -> "Plan":
    """All layers with inputs that are easier to round, not yet encoded.

    Parameters
    ----------
    plan, calibration, progress, found : as in `layerwise.apply`.
    alpha : how much of the difficulty goes to the weights.
    linears : also inputs that a linear layer makes, and not a norm.
    """
    scaled = layerwise.Scaled(plan)
    seen = integers.observe(plan, calibration, partial(make, "minmax", "channel"), progress)
    for names, observer in seen.items():
        maker, source = scaled.maker_of(names[0])
        if scaled.present[f"{maker}.weight"].rows > 1 and not linears:
            continue
        low, high = observer.range(8, True)
        of_inputs = shared(np.maximum(-low, high)[:, 0], source)
        largest = np.max([np.abs(scaled.weights(name)).max(axis=0) for name in names], axis=0)
        s = scale_of(of_inputs, shared(largest, source), alpha)
        scaled.scale(names, maker, source, s)
    return scaled.plan()


def shared(magnitude: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The largest magnitude float32 (cols,) of the columns that each row of the maker makes, (rows,)."""
    out = np.zeros(source.max() + 1, np.float32)
    np.maximum.at(out, source, magnitude)
    return out


def scale_of(of_inputs: np.ndarray, of_weights: np.ndarray, alpha: float) -> np.ndarray:
    """s float32 (n,) (Equation 4); 1 where inputs or weights are always zero."""
    s = np.maximum(of_inputs, LEAST) ** alpha / np.maximum(of_weights, LEAST) ** (1 - alpha)
    return np.where((of_inputs > 0) & (of_weights > 0), np.maximum(s, LEAST), 1).astype(np.float32)
