"""GPTQ: round column after column, and let those that are left make up for the error.

    minimize ‖(W - Ŵ)X‖²        H = X Xᵀ + damping,  H⁻¹ = UᵀU,  U upper triangular

    for each column j:
        ŵ_j = the nearest values on the grid to w_j
        E_j = (w_j - ŵ_j) / U_jj
        W_{:,j+1:} -= E_j U_{j,j+1:}

Of the weights that are left, that is the best answer to each error (see `obq.py`). The order of columns is
the same for all rows, so that all share U. Columns are taken in blocks: within one each error reaches the
columns at once, and those behind it get a whole block's errors in one matrix product.

Source: Frantar et al., GPTQ, arXiv 2210.17323, Algorithm 1. U is there the Cholesky factor of the inverse.
Here it is the inverse of the other Cholesky factor of H, H = RRᵀ with R upper triangular: the same matrix,
without the inverse of one that is badly conditioned.

Differences from the authors' code:

- A group's grid is fit when all errors before it have arrived; theirs does not see those of the block that
  it lies in. The grid has the least error weighted by 1 / U_jj², which is what an error in column j costs
  after the others have made up for it.
- Errors and the rows of U are rounded to multiples of fixed powers of two, so finely that it does not matter,
  and so coarsely that sums of their products have no rounding errors at all. The result then depends neither
  on the block size nor on how a library for matrix products arranges additions.
- Columns whose input was always zero keep their weights, rounded, instead of becoming zero.

Left out: groups of columns that are not neighbors (`g_idx`), for which a layer would have to gather inputs.
"""

import importlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..grid import Grid
from .descent import descend
from .objective import damped, undecided
from .target import Columns, Target, join

ROWS = 512  # that a thread takes together, however many threads there are
SMALL = 64  # matrices that are inverted in one piece
ERROR_BITS, FEEDBACK_BITS = 23, 24  # after the point; with what lies before it, products sum exactly in 53


def gptq(
    w: np.ndarray,
    h: np.ndarray,
    target: Target,
    *,
    damp: float = 0.01,
    order: str | None = None,
    static: bool = False,
    sweeps: int = 0,
    block: int = 128,
    threads: int = 1,
) -> tuple[np.ndarray, Grid]:
    """Codes uint8 (rows, cols) and grid of a layer's weights.

    Parameters
    ----------
    w : float32 (rows, cols).
    h : float (cols, cols), XXᵀ of the layer's inputs.
    target : the grids.
    damp : added to the diagonal of h, as a part of its mean.
    order : None takes columns as they come; "columns" the most important first; "groups" the most important
        group first, and so its columns.
    static : fit all grids to the weights as they are at first; order "columns" needs that, and does it.
    sweeps : times that `descent.descend` goes over the codes and the scales afterwards.
    block : columns whose errors are handed on together. It changes the time that it takes, and nothing else.
    threads : that take rows, which know nothing of each other. Likewise.

    Raises
    ------
    ValueError : when h is not positive definite, or anything is not finite.
    """
    rows, cols = w.shape
    if not np.isfinite(w).all():
        raise ValueError("weights that are no finite numbers")
    h = damped(h, damp)
    span = cols if static or order == "columns" else target.width  # columns that get their grids together
    sequence, u = _in_turn(h, target, damp, order)
    cost = 1 / np.diagonal(u) ** 2 if span < cols else np.diagonal(h)[sequence]
    feedback = _fixed(u / np.diagonal(u)[:, None], 2.0**-FEEDBACK_BITS)
    unit = 2.0 ** math.ceil(math.log2(np.abs(w).max(initial=np.finfo(np.float32).tiny)))

    def of_rows(w: np.ndarray) -> tuple[np.ndarray, Grid]:
        left = _fixed(w.T[sequence].astype(np.float64), unit * 2.0 ** -(ERROR_BITS + FEEDBACK_BITS))
        codes = np.empty(left.shape, np.uint8)
        grids: dict[int, Grid] = {}
        start = 0
        while start < cols:
            if start % span == 0:
                natural = start + np.argsort(sequence[start : start + span])
                first = sequence[natural[0]]
                grids[first] = target.fit(
                    np.ascontiguousarray(left[natural].T, np.float32), cost[natural].astype(np.float32)
                )
                columns = Columns(grids[first], span)
            stop = min(start + block, start // span * span + span)
            at, own = sequence[start:stop] - first, feedback[start:stop, start:stop]
            turn = _compiled if target.compiled and columns.ascending else round_block
            codes[sequence[start:stop]], errors = turn(
                left[start:stop], own, columns, at, unit * 2.0**-ERROR_BITS
            )
            left[stop:] -= feedback[start:stop, stop:].T @ errors
            start = stop
        codes, grid = np.ascontiguousarray(codes.T), join([grids[i] for i in sorted(grids)])
        return descend(w, h, codes, grid, target, sweeps) if sweeps else (codes, grid)

    together = ROWS if target.by_rows else rows
    with ThreadPoolExecutor(threads) as pool:
        codes, grids = zip(*pool.map(of_rows, np.split(w, range(together, rows, together))), strict=True)
    return np.concatenate(codes), join(grids, axis=0)


def costs(h: np.ndarray, target: Target, damp: float, order: str | None) -> np.ndarray:
    """What an error in each column costs after those behind it have made up for it: 1 / U_jj², float64
    (cols,).
    """
    sequence, u = _in_turn(damped(h, damp), target, damp, order)
    cost = np.empty(len(h))
    cost[sequence] = 1 / np.diagonal(u) ** 2
    return cost


def _in_turn(h: np.ndarray, target: Target, damp: float, order: str | None) -> tuple[np.ndarray, np.ndarray]:
    """The order of the columns, int (cols,), and U of them in that order."""
    sequence = _sequence(np.diagonal(h), order, target.width)
    return sequence, inverse_root(h[np.ix_(sequence, sequence)], damp)


def round_block(
    left: np.ndarray, feedback: np.ndarray, columns: Columns, at: np.ndarray, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 and errors float64 (n, rows), multiples of `step`, of a block's columns left float64
    (n, rows), which change. feedback float64 (n, n); `at` int (n,) is where each lies in the grid.
    """
    codes, errors = np.empty(left.shape, np.uint8), np.empty(left.shape)
    for j in range(len(left)):
        codes[j], values = columns.round(at[j], left[j].astype(np.float32))
        errors[j] = _fixed(left[j] - values, step)
        left[j + 1 :] -= np.outer(feedback[j, j + 1 :], errors[j])
    return codes, errors


def _compiled(
    left: np.ndarray, feedback: np.ndarray, columns: Columns, at: np.ndarray, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """`round_block` by its kernel."""
    kernels = importlib.import_module("edgeq.kernels.feedback")
    codes, errors = np.empty(left.shape, np.uint8), np.empty(left.shape)
    kernels.round_block(
        left, np.ascontiguousarray(feedback), at // columns.group, columns.scale, columns.over,
        columns.offset, kernels.table(columns.levels), np.array([step]), codes, errors,
    )  # fmt: skip
    return codes, errors


def inverse_root(h: np.ndarray, damp: float) -> np.ndarray:
    """U float64, upper triangular, with UᵀU = H⁻¹."""
    try:
        r = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as e:
        raise undecided(damp) from e
    return _inverse(np.ascontiguousarray(r))


def _inverse(r: np.ndarray) -> np.ndarray:
    """Inverse of an upper triangular matrix, by halves, most of it matrix products."""
    if len(r) <= SMALL:
        return np.triu(np.linalg.inv(r))
    half = len(r) // 2
    out = np.zeros_like(r)
    out[:half, :half], out[half:, half:] = _inverse(r[:half, :half]), _inverse(r[half:, half:])
    out[:half, half:] = -out[:half, :half] @ (r[:half, half:] @ out[half:, half:])
    return out


def _sequence(importance: np.ndarray, order: str | None, width: int) -> np.ndarray:
    """Columns int (cols,) in the order in which they are taken."""
    match order:
        case None:
            return np.arange(len(importance))
        case "columns":
            return np.argsort(-importance, kind="stable")
        case "groups":
            groups = importance.reshape(-1, width)
            within = np.argsort(-groups, axis=1, kind="stable")
            place = np.arange(len(groups))[:, None] * width + within
            return place[np.argsort(-groups.sum(axis=1), kind="stable")].reshape(-1)
    raise ValueError(f"unknown order {order!r}; there are 'columns', 'groups' and None")


def _fixed(x: np.ndarray, step: float) -> np.ndarray:
    """The nearest multiples of a power of two."""
    return np.rint(x / step) * step
