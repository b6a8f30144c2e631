"""Static quantization: weights and inputs of 8 bits, all scales fixed before the model is used.

    y_i = s_x s_i Σ_j q_ij (q_j - z)        x_j ≈ s_x (q_j - z),  w_ij ≈ s_i q_ij

Observers find the range of each linear's inputs while the model reads a text, and s_x and z of it serve all
tokens; s_i is of a row, or the same for all of a matrix. The sum is one of integers, and -s_x s_i z Σ_j q_ij
does not depend on x. An input beyond its range becomes the end of it: what the text did not show, or what the
observer chose to leave out, is lost.

Source: Jacob et al., arXiv 1712.05877, sections 2.1 to 2.4; Krishnamoorthi, arXiv 1806.08342, section 3.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import formats, uniform
from ..grid import encode
from ..inputs import Inputs
from ..observers import Observer, make
from ..ranges import grid_parameters
from ..tensor import Tensor
from . import integers, layerwise

if TYPE_CHECKING:
    from . import Plan
    from .layerwise import Calibration, Found

Progress = Callable[[str, int, int], None]


def static(
    plan: "Plan",
    calibration: "Calibration",
    progress: Progress | None = None,
    found: "Found | None" = None,
    *,
    per: str = "channel",
    observer: str = "minmax",
    percent: float = 99.99,
    symmetric: bool = True,
) -> "Plan":
    """All matrices of the layers as i8, with fixed scales for their inputs.

    Parameters
    ----------
    plan, calibration, progress, found : as in `layerwise.apply`.
    per : what shares a scale of the weights: "channel", a row, or "tensor".
    observer : of `observers.OBSERVERS`, for the range of the inputs.
    percent : of the values, that the observer "percentile" keeps.
    symmetric : inputs without zero points.
    """
    options: dict[str, Any] = {"percent": percent} if observer == "percentile" else {}
    seen = integers.observe(plan, calibration, partial(make, observer, **options), progress)
    fixed = {name: inputs_of(watch, symmetric) for names, watch in seen.items() for name in names}
    return layerwise.put(
        plan, {t.name: encoded(t, w, per, fixed[t.name]) for t, w in integers.matrices(plan)}
    )


def inputs_of(observer: Observer, symmetric: bool) -> Inputs:
    """The fixed scale, and the zero point, that an observer's range gives."""
    scale, zero = grid_parameters(*observer.range(8, symmetric), 8, symmetric)
    # an input that was always 0 stays it with any scale
    return Inputs("tensor", float(scale[0, 0]) or 1.0, 0 if symmetric else int(zero[0, 0]) - 128)


def encoded(tensor: Tensor, w: np.ndarray, per: str, inputs: Inputs | None) -> Tensor:
    """The weights w float32 (rows, cols) of a tensor as i8, with a scale for each row, or for all."""
    if per not in ("channel", "tensor"):
        raise ValueError(f"a scale per {per!r}, expected 'channel' or 'tensor'")
    grid = uniform.fit(formats.checked(formats.get("i8"), w), 8, per="row" if per == "channel" else per)
    return formats.pack("i8", encode(w, grid), grid)._replace(name=tensor.name, inputs=inputs)
