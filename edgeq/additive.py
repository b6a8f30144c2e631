"""Codes for sums of codebook rows: the inner loops of `quantizers/aqlm.py`, readable. `kernels/additive.py`
has them compiled.

A sum v of one row of each codebook is to stand for a group of weights. What it gains there, against v = 0, is

    2 s b·v - s² vᵀHv        v = Σ_m C_m[code_m],  s: scale of the output row,  H: of the group's inputs

    = Σ_m (2 s b·c_m - s² c_mᵀHc_m) - 2 s² Σ_{k<m} c_kᵀHc_m        c_m = C_m[code_m]

so that the products of all rows with each other, made once for all output rows, leave only sums to be made.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Times = Callable[..., np.ndarray]


class Tables(NamedTuple):
    """Codebooks where errors weigh H. An entry is a row of a codebook, one codebook after the other.

    Attributes
    ----------
    books : float32 (group, entries), a column for each.
    squares : float32 (entries,), cᵀHc.
    pairs : float32 (entries, entries), c_kᵀHc_m; (1, 1) where there is one codebook.
    """

    books: np.ndarray
    squares: np.ndarray
    pairs: np.ndarray


def tables(books: np.ndarray, h: np.ndarray) -> Tables:
    """Of codebooks float32 (codebooks, size, group) and H float32 (group, group)."""
    entries = books.reshape(-1, books.shape[2])
    through = entries @ h
    pairs = through @ entries.T if len(books) > 1 else np.zeros((1, 1), np.float32)
    return Tables(np.ascontiguousarray(entries.T), (through * entries).sum(axis=1), pairs)


def choose(b: np.ndarray, scale: np.ndarray, of: Tables, codes: np.ndarray, beam: int) -> None:
    """Change codes int32 (n, codebooks) to such as gain more, if any are found: codebook after codebook, each
    tried with all its rows beside the best choices so far, of which the `beam` best stay.

    b float32 (n, group), scale float32 (n,).
    """
    count, n = codes.shape[1], np.arange(len(b))
    size = len(of.squares) // count
    first = size * np.arange(count)
    own = 2 * scale[:, None] * (b @ of.books) - (scale * scale)[:, None] * of.squares
    doubled = (2 * scale * scale)[:, None]

    def gain(held: np.ndarray, books: list[int]) -> np.ndarray:
        """Of some codebooks' parts of choices int (n, choices, codebooks)."""
        total = np.zeros(held.shape[:2], np.float32)
        for i, m in enumerate(books):
            total += np.take_along_axis(own, held[:, :, m] + first[m], axis=1)
            for k in books[:i]:
                total -= doubled * of.pairs[held[:, :, k] + first[k], held[:, :, m] + first[m]]
        return total

    held = codes[:, None, :].astype(np.int64)
    before, everything = gain(held, list(range(count)))[:, 0], list(range(count))
    for m in everything:
        others = [k for k in everything if k != m]
        here = slice(first[m], first[m] + size)
        gains = gain(held, others)[:, :, None] + own[:, None, here]
        for k in others:
            gains -= doubled[:, :, None] * of.pairs[held[:, :, k] + first[k], here]
        room = beam if m + 1 < count else 1  # of the last codebook's choices only the best is asked for
        best = np.argsort(-gains.reshape(len(b), -1), axis=1, kind="stable")[:, :room]
        best.sort(axis=1)
        held = held[n[:, None], best // size]
        held[:, :, m] = best % size
    better = gain(held, everything)[:, 0] > before
    codes[better] = held[better, 0]


def times(h: np.ndarray) -> Times:
    """A function (x, start, stop) that multiplies x float32 (n, cols) with the columns start:stop of h."""
    h = h.astype(np.float32)
    return lambda x, start=0, stop=None: x @ h[:, start:stop]
