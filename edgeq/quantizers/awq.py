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
of all of the text, from H, where theirs come from a sample of it. Where several heads of queries share
the values of one, whose rows make the inputs of attn_output, theirs leaves attn_output alone; here their
columns share a scale.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np

from ..convert.stream import in_order
from ..grid import decode, encode
from ..kernels import numpy_backend
from .target import Target

GRID = 20  # values of α
CLIPS = np.linspace(1, 0.5, 10, endpoint=False, dtype=np.float32)  # parts of a range
NEAR = 256  # rows that stay in the cache while their clips are looked for
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
    gram: Callable[[np.ndarray], np.ndarray] = numpy_backend.gram,
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
    gram : xᵀ x of a backend.
    threads : that take values of α.
    """
    w, h = np.concatenate(weights).astype(np.float32), h.astype(np.float32)
    if source is not None:
        magnitude = (np.bincount(source, magnitude) / np.maximum(np.bincount(source), 1))[source]

    def left_of(alpha: float) -> np.ndarray:
        s = scale_of(magnitude, alpha)
        left = rounded(w * s, target, None if costs is None else costs / s**2)
        return np.subtract(w, np.divide(left, s, out=left), out=left)

    def error_of(left: np.ndarray) -> float:
        if costs is not None:
            return float(np.einsum("ij,ij->j", left, left) @ costs)
        return float(np.einsum("ij,ij->i", gram(left), h).sum(dtype=np.float64))  # tr(H LᵀL)

    alphas = np.arange(GRID) / GRID
    with closing(in_order((partial(left_of, alpha) for alpha in alphas), threads)) as lefts:
        errors = np.array([error_of(left) for left in lefts])
    best = float(alphas[errors.argmin()])
    return Scaling(scale_of(magnitude, best), best, errors)


def scale_of(magnitude: np.ndarray, alpha: float) -> np.ndarray:
    """s float32 (cols,), the geometric mean of whose ends is 1."""
    s = np.maximum(magnitude, LEAST) ** alpha
    return (s / np.sqrt(s.max() * s.min())).astype(np.float32)


def rounded(w: np.ndarray, target: Target, importance: np.ndarray | None = None) -> np.ndarray:
    """Q(w) for w float32 (rows, cols)."""
    grid = target.fit(w, None if importance is None else importance.astype(np.float32))
    if target.compiled and (np.diff(grid.levels.astype(np.float32)) > 0).all():
        return importlib.import_module("edgeq.kernels.encode").rounded(w, grid)
    return decode(encode(w, grid), grid)


def clip(w: np.ndarray, h: np.ndarray, target: Target, *, threads: int = 1) -> np.ndarray:
    """The weights float32 (rows, cols), each group cut to the part of its range that leaves ‖(W - Ŵ)X‖²
    least, as far as that is the group's own doing.

    h : float (cols, cols), XXᵀ of their inputs.
    threads : that take rows.
    """
    width = target.width
    n = np.arange(w.shape[1] // width)
    own = h.reshape(len(n), width, len(n), width)[n, :, n].astype(np.float32)  # (groups, width, width)
    parts = (partial(_clip, w[start : start + NEAR], own, target) for start in range(0, len(w), NEAR))
    with closing(in_order(parts, threads)) as clipped:
        return np.concatenate(list(clipped))


def _clip(w: np.ndarray, own: np.ndarray, target: Target) -> np.ndarray:
    """`clip` of some rows; own float32 (groups, width, width), the blocks on the diagonal of H."""
    groups = w.reshape(len(w), len(own), -1)
    ends = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    best, chosen = np.full(groups.shape[:2], np.inf, np.float32), groups
    for part in CLIPS:
        cut = np.clip(groups, ends[0] * part, ends[1] * part)
        left = (groups - rounded(cut.reshape(w.shape), target).reshape(groups.shape)).swapaxes(0, 1)
        error = np.einsum("grj,grj->rg", left @ own, left)
        better = error < best
        best = np.where(better, error, best)
        chosen = np.where(better[:, :, None], cut, chosen)
    return chosen.reshape(w.shape)
