"""AWQ, activation-aware weight quantization: scale columns up before rounding, by how large their inputs are.

    Ŵ = Q(W · diag(s)) · diag(s)⁻¹        s = (mean |x|)^α,  α in [0, 1)

A column that is s times as large is rounded with about the same steps, so its error is an s-th of what it
was. Whoever computes the inputs, a norm or another linear layer, divides them by s, so the file is a plain
one, and the layer computes what it did. Of twenty α that one is taken which leaves

    ‖(W - Ŵ)X‖² = tr((W - Ŵ) H (W - Ŵ)ᵀ)

least; α = 0 is plain rounding. Then each group may be clipped: of ten parts of its range, down to a half,
that one is taken which leaves the group's own part of the output best. Where GPTQ is to round, an error
costs what is left of it after the other columns have made up for it (see `gptq.costs`), and nothing is
clipped, since that would be an error from the start.

Source: Lin et al., AWQ, arXiv 2306.00978, section 3 and Equations 4 and 5; the clipping from the authors'
code.

Differences from the authors' code: errors are those of the layers that share X, summed, where theirs for q,
k, v and for gate, up is that of the attention's and of the whole feed-forward network's output. They are
exact for all of the text, from H, where theirs come from a sample of it. Where several heads of queries share
the values of one, whose rows make the inputs of attn_output, theirs leaves attn_output alone; here their
columns share a scale.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ..grid import decode, encode
from .target import Target

GRID = 20  # values of α
CLIPS = np.linspace(1, 0.5, 10, endpoint=False, dtype=np.float32)  # parts of a range
LEAST = 1e-4  # of a magnitude, so that inputs that are always zero leave weights finite


class Scaling(NamedTuple):
    """What was found.

    Attributes
    ----------
    scale : float32 (cols,), s of each input.
    alpha : the exponent.
    errors : Σ ‖(W - Ŵ)X‖² for each α that was tried.
    """

    scale: np.ndarray
    alpha: float
    errors: np.ndarray


def search_scale(
    weights: Sequence[np.ndarray],
    h: np.ndarray,
    magnitude: np.ndarray,
    target: Target,
    source: np.ndarray | None = None,
    costs: np.ndarray | None = None,
    *,
    threads: int = 1,
) -> Scaling:
    """The best scale of the inputs that some layers share.

    Parameters
    ----------
    weights : float32 (rows, cols) each.
    h : float (cols, cols), XXᵀ of their inputs.
    magnitude : float (cols,), the mean of |x|.
    target : the grids.
    source : int (cols,), which row of the layer before makes each input, where several come of one: these
        share a scale.
    costs : float (cols,), of errors in each column, in the place of h.
    threads : that take values of α.
    """
    w, h = np.concatenate(weights).astype(np.float32), h.astype(np.float32)
    if source is not None:
        magnitude = (np.bincount(source, magnitude) / np.maximum(np.bincount(source), 1))[source]

    def error_of(alpha: float) -> float:
        s = scale_of(magnitude, alpha)
        left = w - rounded(w * s, target, None if costs is None else costs / s**2) / s
        if costs is not None:
            return float(np.einsum("ij,ij->j", left, left) @ costs)
        return float(np.einsum("ij,ij->i", left @ h, left).sum(dtype=np.float64))

    alphas = np.arange(GRID) / GRID
    with ThreadPoolExecutor(threads) as pool:
        errors = np.array(list(pool.map(error_of, alphas)))
    best = float(alphas[errors.argmin()])
    return Scaling(scale_of(magnitude, best), best, errors)


def scale_of(magnitude: np.ndarray, alpha: float) -> np.ndarray:
    """s float32 (cols,), the geometric mean of whose ends is 1."""
    s = np.maximum(magnitude, LEAST) ** alpha
    return (s / np.sqrt(s.max() * s.min())).astype(np.float32)


def rounded(w: np.ndarray, target: Target, importance: np.ndarray | None = None) -> np.ndarray:
    """Q(w) for w float32 (rows, cols)."""
    grid = target.fit(w, None if importance is None else importance.astype(np.float32))
    return decode(encode(w, grid), grid)


def clip(w: np.ndarray, h: np.ndarray, target: Target) -> np.ndarray:
    """The weights float32 (rows, cols), each group cut to the part of its range that leaves ‖(W - Ŵ)X‖²
    least, as far as that is the group's own doing. h float (cols, cols), XXᵀ of their inputs.
    """
    rows, width = len(w), target.width
    groups = w.reshape(rows, -1, width)
    ends = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    n = np.arange(groups.shape[1])
    own = h.reshape(len(n), width, len(n), width)[n, :, n].astype(np.float32)  # (groups, width, width)
    best, chosen = np.full((rows, len(n)), np.inf, np.float32), w
    for part in CLIPS:
        cut = np.clip(groups, ends[0] * part, ends[1] * part).reshape(w.shape)
        left = (w - rounded(cut, target)).reshape(groups.shape).swapaxes(0, 1)
        error = ((left @ own) * left).sum(axis=2).T
        better = error < best
        best = np.where(better, error, best)
        chosen = np.where(np.repeat(better, width, axis=1), cut, chosen)
    return chosen
