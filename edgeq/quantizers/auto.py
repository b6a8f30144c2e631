"""Auto: of each matrix the type that its share of a file's size is best spent on.

    minimize  Σ_t e_t(f_t)      over types f_t, with      Σ_t bytes_t(f_t) <= bits * weights / 8

    e_t(f) = ‖(W - Ŵ)X‖² / ‖WX‖²      of the matrix t rounded as type f, its inputs X those of the whole model

All matrices count alike: what one does to its own output, relative to that, is taken for what it does to the
model. Of the embedding and the output matrix, whose inputs no layer sees, X is white.

With a price λ for a byte each matrix chooses alone, the least e_t + λ bytes_t. As the price falls, each moves
along the convex hull of its (bytes, error); so all moves in order of what an error less costs, as long as
there is room, are the answer for the size that they reach.

Source: Shoham and Gersho, Efficient bit allocation for an arbitrary set of quantizers, 1988, the greedy walk
along the hulls.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .. import formats
from ..grid import decode, encode
from .layerwise import Calibration, Progress, inputs_of, to_encode
from .objective import error
from .target import target

if TYPE_CHECKING:
    from . import Plan

TYPES = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")

SAMPLE = 2048  # rows of a matrix outside of the layers that are looked at, or a few more


class Choice(NamedTuple):
    """A type that a matrix may get: bytes that it takes, and the error that it leaves."""

    type: str
    nbytes: int
    error: float


def measure(
    plan: "Plan", calibration: Calibration, progress: Progress | None = None
) -> dict[str, list[Choice]]:
    """The choices of each matrix that the plan quantizes."""
    found, names = {}, to_encode(plan, everywhere=True)
    for linear, inputs in inputs_of(plan, calibration, progress):
        for name, w in linear.parts():
            if name in names:
                found[name] = _choices(w, inputs.hessian.astype(np.float32))
    for r in plan.recodings:
        if r.tensor.name in names and r.tensor.name not in found:
            some = formats.take(r.tensor, np.arange(0, r.tensor.rows, max(1, r.tensor.rows // SAMPLE)))
            found[r.tensor.name] = [
                c._replace(nbytes=c.nbytes // some.rows * r.tensor.rows)
                for c in _choices(formats.dequantize(some), None)
            ]
    return found


def _choices(w: np.ndarray, h: np.ndarray | None) -> list[Choice]:
    """What each type makes of weights float32 (rows, cols); h (cols, cols), or None for white inputs."""
    made = []
    for type in TYPES:
        if w.shape[1] % formats.get(type).BLOCK == 0:
            importance = None if h is None else np.ascontiguousarray(np.diagonal(h))
            grid = target(type, w.shape[1]).fit(w, importance)
            left = decode(encode(w, grid), grid)
            e = error(w, left, h) if h is not None else float(((w - left) ** 2).sum() / (w**2).sum())
            made.append(Choice(type, len(w) * formats.row_bytes(type, w.shape[1]), e))
    return made


def hull(choices: list[Choice]) -> list[Choice]:
    """Those that are the best for some price, the smallest first, each with less error than the last."""
    best: list[Choice] = []
    for c in sorted(choices, key=lambda c: (c.nbytes, c.error)):
        if best and c.error >= best[-1].error:
            continue
        while len(best) > 1 and _gain(best[-2], c) >= _gain(best[-2], best[-1]):
            best.pop()
        best.append(c)
    return best


def _gain(a: Choice, b: Choice) -> float:
    """Error less for each byte more."""
    return (a.error - b.error) / max(b.nbytes - a.nbytes, 1)


def choose(choices: Mapping[str, list[Choice]], nbytes: float) -> dict[str, str]:
    """A type for each matrix, with the least sum of errors in so many bytes.

    Raises
    ------
    ValueError : when even the smallest types take more.
    """
    hulls = {name: hull(of) for name, of in choices.items()}
    left = nbytes - sum(of[0].nbytes for of in hulls.values())
    if left < 0:
        raise ValueError(f"the smallest types take {nbytes - left:,.0f} bytes, more than {nbytes:,.0f}")
    moves = sorted(
        (-_gain(a, b), name, i) for name, of in hulls.items() for i, (a, b) in enumerate(pairwise(of))
    )
    place = dict.fromkeys(hulls, 0)
    for _, name, i in moves:
        more = hulls[name][i + 1].nbytes - hulls[name][i].nbytes
        if place[name] == i and more <= left:
            place[name], left = i + 1, left - more
    return {name: hulls[name][i].type for name, i in place.items()}
