"""OBQ, Optimal Brain Quantization: round one weight after another, the one that costs least first.

    p = argmin (quant(w_p) - w_p)² / [H⁻¹]_pp                    the least rise of ‖(w - ŵ)X‖²
    w -= (w_p - quant(w_p)) / [H⁻¹]_pp · H⁻¹_{:,p}               the best answer of the weights that are left
    H⁻¹ -= H⁻¹_{:,p} H⁻¹_{p,:} / [H⁻¹]_pp                        which p is no more one of

A weight that was pushed off the grid, by more than half a step, goes first: later there are fewer to answer.

Each row has an order of its own, and so an H⁻¹ of its own: (rows * cols³) operations, for small layers. GPTQ
takes the same order for all, and is this with `order` given, which is what this file is for.

Source: Frantar, Singh, Alistarh, Optimal Brain Compression, arXiv 2208.11580: Lemma 1 and section 5.
"""

from collections.abc import Sequence

import numpy as np

from ..grid import Grid
from .objective import damped, undecided
from .target import Columns, Target


def obq(
    w: np.ndarray,
    h: np.ndarray,
    target: Target,
    *,
    damp: float = 0.01,
    order: Sequence[int] | None = None,
) -> tuple[np.ndarray, Grid]:
    """Codes uint8 (rows, cols) and grid, which is fit to the weights as they are at first.

    Parameters
    ----------
    w, h, target, damp : as in `gptq.gptq`.
    order : columns, in the order in which they are rounded; None chooses greedily.
    """
    h = damped(h, damp)
    try:
        np.linalg.cholesky(h)
    except np.linalg.LinAlgError as e:
        raise undecided(damp) from e
    inverse = np.linalg.inv(h)
    grid = target.fit(np.asarray(w, np.float32), np.diagonal(h).astype(np.float32))
    codes = np.empty(w.shape, np.uint8)
    for i, row in enumerate(w):
        one = {k: v[i : i + 1] for k, v in grid._asdict().items() if k != "levels" and v is not None}
        codes[i] = _row(
            row.astype(np.float64), inverse.copy(), Columns(grid._replace(**one), w.shape[1]), order
        )
    return codes, grid


def _row(w: np.ndarray, inverse: np.ndarray, columns: Columns, order: Sequence[int] | None) -> np.ndarray:
    """Codes uint8 (cols,) of a row; w and the inverse are used up."""
    codes, left = np.empty(len(w), np.uint8), list(range(len(w)))
    while left:
        rounded = [columns.round(p, w[p : p + 1].astype(np.float32)) for p in left]
        errors = w[left] - [value[0] for _, value in rounded]
        if order is not None:
            at = left.index(order[len(w) - len(left)])
        else:
            half = [abs(columns.scale[p // columns.group, 0]) / 2 for p in left]
            beyond = np.abs(errors) - half
            at = int(beyond.argmax())
            if beyond[at] <= 1e-5 * half[at]:
                at = int((errors**2 / np.diagonal(inverse)[left]).argmin())
        p = left.pop(at)
        codes[p] = rounded[at][0][0]
        w -= errors[at] / inverse[p, p] * inverse[:, p]
        inverse -= np.outer(inverse[:, p], inverse[p]) / inverse[p, p]
        inverse[p, p] = 1  # never divided by again; keeps the rest of it zero
    return codes
