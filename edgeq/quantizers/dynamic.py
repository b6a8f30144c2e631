"""Dynamic quantization: weights of 8 bits, and inputs that are rounded to 8 bits with a scale of their own.

    y_i = s_i s_x Σ_j q_ij q_j        s_x = max |x_j| / 127 of this token, or of each 32 of its numbers

No text is needed, no input lies beyond its range, and a token with outliers costs the others nothing. What
it takes is a maximum of each token before its product. With a scale for 32 numbers an outlier costs only its
neighbors.

Source: Yao et al., ZeroQuant, arXiv 2206.01861, section 3.2 (token-wise); for 32 numbers, llama.cpp's Q8_0.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..inputs import Inputs
from . import integers, layerwise
from .static import encoded

if TYPE_CHECKING:
    from . import Plan
    from .layerwise import Calibration, Found

Progress = Callable[[str, int, int], None]


def dynamic(
    plan: "Plan",
    calibration: "Calibration",
    progress: Progress | None = None,
    found: "Found | None" = None,
    *,
    per: str = "channel",
    inputs: str = "token",
) -> "Plan":
    """All matrices of the layers as i8, with scales for their inputs that are found at run time.

    Parameters
    ----------
    plan, calibration, progress, found : as in `layerwise.apply`; no text is read.
    per : what shares a scale of the weights: "channel", a row, or "tensor".
    inputs : what shares one of the inputs: "token", or "block", 32 numbers of a token.
    """
    if inputs not in ("token", "block"):
        raise ValueError(f"inputs of a {inputs!r}, expected 'token' or 'block'")
    return layerwise.put(
        plan, {t.name: encoded(t, w, per, Inputs(inputs)) for t, w in integers.matrices(plan)}
    )
