"""How far the tensors of one model are from those of another, a few rows at a time.

relative error    √(Σ (w - o)² / Σ o²)           of weights w from originals o
SQNR              -20 log10(relative error)      signal to quantization noise, in dB
cosine            Σ w o / √(Σ w² Σ o²)
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import files, formats
from ..convert.source import Source, open_source
from ..tensor import Tensor

PANEL = 1 << 18  # weights that are decoded together
TIED = {"output.weight": "token_embd.weight", "lm_head.weight": "model.embed_tokens.weight"}


class Distance(NamedTuple):
    """How far weights are from their originals; all is NaN where any weight is.

    Attributes
    ----------
    relative : √(Σ (w - o)² / Σ o²); infinite where only the originals are all zero.
    maximum : largest |w - o|.
    cosine : of the angle between both, NaN where either is all zero.
    """

    relative: float
    maximum: float
    cosine: float

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in dB, infinite where there is no noise."""
        return -20 * math.log10(self.relative) if self.relative else math.inf


def side_by_side(path: Path, other: Path) -> tuple[Source, Source]:
    """Two models under the same names: those of their container if it is the same, otherwise GGUF's."""
    if path.is_dir() and other.is_dir():
        one, two = (Source(folder, *files.read(folder), rows={}) for folder in (path, other))
        return one, two
    return open_source(path), open_source(other)


def counterpart(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The same name, or for an output matrix that of the embedding that serves as one; None for neither."""
    return next((key for key in (name, TIED.get(name)) if key in tensors), None)


def between(source: Source, name: str, original: Source, other: str) -> Distance | None:
    """Distance of a tensor from another one's of the original; None where their shapes differ."""
    w, o = source.tensors[name], original.tensors[other]
    return distance(w, o, source.rows.get(name), original.rows.get(other)) if w.shape == o.shape else None


def panels(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """First row and end of each piece of a tensor."""
    rows, step = tensor.rows if tensor.cols else 0, max(1, PANEL // max(tensor.cols, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def distance(
    tensor: Tensor,
    original: Tensor,
    order: np.ndarray | None = None,
    original_order: np.ndarray | None = None,
) -> Distance:
    """Distance of two tensors of one shape; `order` is that in which rows are wanted, if it is not theirs."""
    noise = signal = power = product = maximum = 0.0
    with np.errstate(invalid="ignore", over="ignore"):  # the file may hold anything
        for start, stop in panels(tensor):
            w, o = _weights(tensor, start, stop, order), _weights(original, start, stop, original_order)
            power, signal, product = power + _dot(w, w), signal + _dot(o, o), product + _dot(w, o)
            w -= o
            noise += _dot(w, w)
            maximum = max(maximum, float(np.abs(w, out=w).max()))
    if math.isnan(noise):
        return Distance(math.nan, math.nan, math.nan)
    relative = math.sqrt(noise / signal) if signal else math.inf if noise else 0.0
    both = math.sqrt(signal) * math.sqrt(power)
    return Distance(relative, maximum, product / both if both else math.nan)


def _weights(tensor: Tensor, start: int, stop: int, order: np.ndarray | None) -> np.ndarray:
    """float64 (n,): the rows start:stop of a tensor whose rows are wanted in that order."""
    if order is None:
        w = formats.dequantize(tensor, start, stop)
    else:
        w = formats.dequantize(formats.take(tensor, order[start:stop]))
    files.release(tensor.data)
    return w.astype(np.float64).reshape(-1)


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    """Σ x y. BLAS would start threads for it, which wait for each other longer than they add."""
    return float(np.einsum("i,i->", x, y))
