"""AQLM: a group of weights is a sum of rows of several codebooks, chosen for what the layer computes.

    ŵ_ij = s_i Σ_m C_m[b_ijm]        i: output, j: group of inputs, m: codebook

    minimize ‖(W - Ŵ)X‖² = tr((W - Ŵ) H (W - Ŵ)ᵀ)        H = X Xᵀ + damping

The start: each codebook is a k-means of what those before it have left of the weights, divided by the scales
s_i, the root mean squares of the rows. Then, in rounds,

    codes        group after group, in all rows at once: a beam search over the group's codebooks, the rest of
                 the row as it is (`additive.py`)
    codebooks    by least squares, codes and scales as they are
    scales       likewise, a quotient for each row

Each makes the error smaller or leaves things as they are, so it falls with every round.

Source: Egiazarian et al., AQLM, arXiv 2401.06118, section 3 (phases 1 and 2) and Equations 4 to 7.

Differences from the authors' code:

- Before the first round, codes are chosen once as GPTQ would (`gptq.py`): group after group, while the
  weights that are still free make up for the error. What k-means chose is far from what H asks for, and a
  search that moves one group at a time stays near where it begins.
- Codebooks are refit by conjugate gradients, not Adam: the error is quadratic in them, a step is one product
  with H, there is no learning rate, and it never rises. The normal equations, 4096 unknowns with 2x8, are
  dense, and cost more to make than a few steps.
- The beam belongs to a group: of its best choices one is kept before the next group's turn. Theirs keeps some
  whole rows; by default one.
- Codebooks and scales are float16 throughout, as the file has them, so what is measured is what is stored.

Left out: groups of several outputs, of which no published checkpoint makes use. Phase 3, in which what is not
codes learns in a whole transformer block, is in `train/codebooks.py`.
"""

import importlib
from types import ModuleType
from typing import NamedTuple

import numpy as np

from .. import additive
from ..additive import Tables, Times, tables
from ..formats.aqlm import decode
from .gptq import inverse_root
from .objective import damped

BLOCK = 128  # columns between two products with all of H
ENTRIES = 1 << 13  # of all codebooks, when there are several: their products with each other are in memory
RIDGE = 1e-6  # of a codebook row's own equations, so that they have a solution


class Additive(NamedTuple):
    """What was found.

    Attributes
    ----------
    codes : int32 (rows, groups, codebooks).
    codebooks : float16 (codebooks, size, group).
    scale : float16 (rows,).
    errors : ‖(W - Ŵ)X‖² / ‖WX‖² before the first round and after each.
    """

    codes: np.ndarray
    codebooks: np.ndarray
    scale: np.ndarray
    errors: list[float]


class Layer(NamedTuple):
    """What is to be approximated: w float32 (rows, cols), h float64 (cols, cols), `times` that multiplies by
    h; and the module of the inner loops.
    """

    w: np.ndarray
    h: np.ndarray
    times: Times
    loops: ModuleType

    def error(self, e: np.ndarray) -> float:
        """tr(e h eᵀ)"""
        return float(np.sum(e * self.times(e), dtype=np.float64))


def aqlm(
    w: np.ndarray,
    h: np.ndarray,
    *,
    codebooks: int = 2,
    bits: int = 8,
    group: int = 8,
    beam: int = 16,
    rounds: int = 8,
    tolerance: float = 0.01,
    damp: float = 0.01,
    seed: int = 0,
    compiled: bool = True,
) -> Additive:
    """Codes, codebooks and scales of a layer's weights.

    Parameters
    ----------
    w : float32 (rows, cols).
    h : float (cols, cols), XXᵀ of the layer's inputs.
    codebooks, bits, group : how many codebooks, bits of a code, and weights of a group.
    beam : choices that a search keeps.
    rounds : at most so many.
    tolerance : a round whose part of the error that it takes away is less is the last.
    damp : added to the diagonal of h, as a part of its mean.
    seed : of the k-means.
    compiled : with Numba's kernels; sums are made in another order, and that is all.

    Raises
    ------
    ValueError : when h is not positive definite, anything is not finite, or sizes do not fit.
    """
    _check(w, codebooks, bits, group)
    loops = importlib.import_module("edgeq.kernels.additive") if compiled else additive
    h = damped(h, damp)
    h /= np.diagonal(h).mean()
    layer = Layer(w, h, loops.times(h), loops)
    scale = _half(np.sqrt(np.square(w, dtype=np.float64).mean(axis=1)))
    x = w * np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)[:, None]
    rng = np.random.default_rng(seed)
    codes, books = residual_kmeans(x.reshape(-1, group), codebooks, 1 << bits, rng, loops)
    codes = codes.reshape(len(w), -1, codebooks)
    with_feedback(layer, codes, books, scale, beam, damp)
    whole = layer.error(w) or 1.0
    errors = [layer.error(w - decode(codes, books, scale)) / whole]
    for _ in range(rounds):
        books = refit(layer, codes, books, scale)
        scale = rescale(layer, codes, books, scale)
        search(layer, codes, books, scale, beam)
        errors.append(layer.error(w - decode(codes, books, scale)) / whole)
        if errors[-1] > (1 - tolerance) * errors[-2]:
            break
    books = refit(layer, codes, books, scale)
    scale = rescale(layer, codes, books, scale)
    return Additive(codes, books.astype(np.float16), scale.astype(np.float16), errors)


def _check(w: np.ndarray, codebooks: int, bits: int, group: int) -> None:
    """ValueError for what cannot be done."""
    if not 4 <= bits <= 16 or codebooks < 1 or group < 1:
        raise ValueError(f"{codebooks} codebooks of {bits} bits; there may be any number, of 4 to 16 bits")
    if codebooks > 1 and codebooks << bits > ENTRIES:
        raise ValueError(f"{codebooks} codebooks of {bits} bits have more than {ENTRIES:,} rows: take fewer")
    if w.shape[1] % group:
        raise ValueError(f"{w.shape[1]} columns are no whole groups of {group}")
    if not np.isfinite(w).all():
        raise ValueError("weights that are no finite numbers")
    if np.abs(w).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError("weights beyond float16, in which AQLM keeps scales")


def _half(x: np.ndarray) -> np.ndarray:
    """The nearest float16, as float32."""
    return x.astype(np.float16).astype(np.float32)


def residual_kmeans(
    x: np.ndarray, count: int, size: int, rng: np.random.Generator, loops: ModuleType
) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 (n, count) and codebooks float32 (count, size, group) for points x float32 (n, group)."""
    left = x.copy()
    codes, books = np.empty((len(x), count), np.int32), np.empty((count, size, x.shape[1]), np.float32)
    for m in range(count):
        codes[:, m], books[m] = kmeans(left, size, rng, loops)
        left -= books[m][codes[:, m]]
    return codes, _half(books)


def kmeans(
    x: np.ndarray, size: int, rng: np.random.Generator, loops: ModuleType, passes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """Codes int32 (n,) and centers float32 (size, group) for points x float32 (n, group)."""
    n = len(x)
    ones, alone = np.ones(n, np.float32), np.zeros((1, 1), np.float32)
    centers, codes = x[rng.permutation(n)[np.arange(size) % n]], np.zeros((n, 1), np.int32)
    for turn in range(passes + 1):
        # to gain most, 2 x·c - c·c, is to be nearest
        nearest = Tables(np.ascontiguousarray(centers.T), np.square(centers).sum(axis=1), alone)
        loops.choose(x, ones, nearest, codes, 1)
        if turn < passes:
            uses = np.bincount(codes[:, 0], minlength=size)
            sums = scatter(codes[:, 0], x.astype(np.float64), size)
            centers = (sums / np.maximum(uses, 1)[:, None]).astype(np.float32)
            empty = np.flatnonzero(uses == 0)
            centers[empty] = x[rng.integers(0, n, len(empty))]
    return codes[:, 0], centers


def scatter(codes: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Sums of the values float64 (n, group) that have the same code (n,): float64 (size, group)."""
    return np.stack([np.bincount(codes, column, size) for column in values.T], axis=1)


def _blocks(layer: Layer, group: int) -> list[tuple[int, int]]:
    """First column and end of each block, of whole groups."""
    cols, width = layer.w.shape[1], max(BLOCK // group, 1) * group
    return [(start, min(start + width, cols)) for start in range(0, cols, width)]


def with_feedback(
    layer: Layer, codes: np.ndarray, books: np.ndarray, scale: np.ndarray, beam: int, damp: float
) -> None:
    """Choose all codes anew, with the weights that are still free making up for each error: Algorithm 1 of
    GPTQ (arXiv 2210.17323), with blocks U_jj in the place of numbers.
    """
    u, group = inverse_root(layer.h, damp), books.shape[2]
    left = layer.w.astype(np.float64)
    for start, stop in _blocks(layer, group):
        errors = []
        for j in range(start, stop, group):
            here = slice(j, j + group)
            root = np.linalg.inv(u[here, here])
            cost = root @ root.T  # of an error here, after the others have made up for it
            mine = np.ascontiguousarray(codes[:, j // group])
            b = (left[:, here] @ cost).astype(np.float32)
            layer.loops.choose(b, scale, tables(books, cost.astype(np.float32)), mine, beam)
            codes[:, j // group] = mine
            errors.append((left[:, here] - decode(mine[:, None], books, scale)) @ root)
            left[:, j + group : stop] -= errors[-1] @ u[here, j + group : stop]
        left[:, stop:] -= np.concatenate(errors, axis=1) @ u[start:stop, stop:]


def search(layer: Layer, codes: np.ndarray, books: np.ndarray, scale: np.ndarray, beam: int) -> None:
    """Choose the codes of one group after the other, in all rows, the rest of the row as it is."""
    h, group = layer.h.astype(np.float32), books.shape[2]
    e = layer.w - decode(codes, books, scale)
    for start, stop in _blocks(layer, group):
        g = layer.times(e, start, stop)  # of what the errors are a half of the gradient of
        for j in range(start, stop, group):
            here = slice(j, j + group)
            mine = np.ascontiguousarray(codes[:, j // group])
            old = decode(mine[:, None], books, scale)
            b = g[:, j - start : j - start + group] + old @ h[here, here]
            layer.loops.choose(b, scale, tables(books, h[here, here]), mine, beam)
            moved = old - decode(mine[:, None], books, scale)
            codes[:, j // group] = mine
            e[:, here] += moved
            g += moved @ h[here, start:stop]


def refit(
    layer: Layer, codes: np.ndarray, books: np.ndarray, scale: np.ndarray, steps: int = 6
) -> np.ndarray:
    """Codebooks of least error, by conjugate gradients; preconditioned by each codebook row's own equations.

    Those are, with A the linear map from codebooks to weights, blocks of AᵀHA on its diagonal,
    Σ s² H_jj over the groups j that use the row.
    """
    count, size, group = books.shape

    def to_books(y: np.ndarray) -> np.ndarray:
        """Aᵀy, float64 (count, size, group)."""
        y = (y * scale[:, None]).reshape(-1, group).astype(np.float64)
        return np.stack([scatter(codes[:, :, m].reshape(-1), y, size) for m in range(count)])

    e = layer.w - decode(codes, books, scale)
    through = layer.times(e)
    before = np.sum(e * through, dtype=np.float64)
    inverse = np.linalg.inv(_own_equations(layer, codes, scale, size))
    x, r = books.astype(np.float64), to_books(through)
    z = np.matmul(inverse, r[..., None])[..., 0]
    p, rz = z, np.sum(r * z)
    for _ in range(steps):
        step = decode(codes, p, scale)
        through = layer.times(step)
        bend = np.sum(step * through, dtype=np.float64)
        if not (rz > 0 and bend > 0):  # nothing is left that float32 could hold
            break
        alpha = rz / bend
        x += alpha * p
        r -= alpha * to_books(through)
        z = np.matmul(inverse, r[..., None])[..., 0]
        rz, last = np.sum(r * z), rz
        p = z + rz / last * p
    made = _half(x)
    # float16 may take away more than is left to be gained
    return made if layer.error(layer.w - decode(codes, made, scale)) < before else books


def _own_equations(layer: Layer, codes: np.ndarray, scale: np.ndarray, size: int) -> np.ndarray:
    """The blocks, float64 (count, size, group, group)."""
    groups, count = codes.shape[1:]
    n, group = np.arange(groups), len(layer.h) // groups
    blocks = layer.h.reshape(groups, group, groups, group)[n, :, n].reshape(groups, -1)
    square = np.repeat(np.square(scale, dtype=np.float64), groups)
    out = np.empty((count, size, group, group))
    for m in range(count):
        uses = np.bincount((codes[:, :, m] + n * size).reshape(-1), square, groups * size)
        out[m] = (uses.reshape(groups, size).T @ blocks).reshape(size, group, group)
    trace = np.trace(out, axis1=2, axis2=3)
    ridge = RIDGE * np.where(trace > 0, trace, trace.max() or 1)
    return out + ridge[:, :, None, None] * np.eye(group)


def rescale(layer: Layer, codes: np.ndarray, books: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Scales of least error: of a row w and its sum u of codebook rows, s = wHu / uHu."""
    u = decode(codes, books, np.ones_like(scale))
    through = layer.times(u)
    uw, uu = (np.sum(through * y, axis=1, dtype=np.float64) for y in (layer.w, u))
    made = _half(np.divide(uw, uu, out=np.zeros_like(uw), where=uu > 0))
    error, old_error = (s * (s * uu - 2 * uw) for s in (made, scale))
    return np.where(error < old_error, made, scale)
