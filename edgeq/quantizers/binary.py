"""Binary weights after training: their signs, times a scale for some columns of a row.

    minimize Σ h_j (w_j - s sign(w_j))²        s = Σ h_j |w_j| / Σ h_j

Then `feedback` lets the weights that are not yet rounded make up for the errors of those that are, by GPTQ's
rule, h_j being what it costs; without it h_j = 1.

A model that was not trained with such weights says nothing sensible with them; what is left is a lower bound
for what training, or a better algorithm, can do. tools/LOG.md has the figures.

Source: Rastegari et al., XNOR-Net, arXiv 1603.05279, Equations 3 to 6.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..formats import binary as stored
from ..grid import Grid
from .target import Target
from .ternary import GROUP, few_values

if TYPE_CHECKING:
    from . import Plan
    from .layerwise import Calibration, Found

Progress = Callable[[str, int, int], None]


def binary(
    plan: "Plan",
    calibration: "Calibration",
    progress: Progress | None = None,
    found: "Found | None" = None,
    *,
    group: int = GROUP,
    feedback: bool = True,
    damp: float = 0.01,
) -> "Plan":
    """All matrices of the layers with two values, stored as integers of 2 bits; the rest is as in
    `ternary.ternary`.
    """
    target = Target("binary", group, partial(fit, group=group))
    return few_values(plan, calibration, progress, found, target, feedback, damp)


def fit(w: np.ndarray, importance: np.ndarray | None = None, *, group: int = GROUP) -> Grid:
    """The grid of w float32 (rows, cols) with the least error, weighted by importance (cols,) or as w."""
    weight = None if importance is None else np.broadcast_to(importance, w.shape)
    return stored.fit(w, weight, group=group)
