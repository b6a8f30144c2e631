"""Observers: what range the inputs of a layer have, seen batch by batch, in memory that does not grow.

    minmax            from the smallest value to the largest
    moving_average    the same of each batch, and of these a running mean
    percentile        all but the outermost
    mse               the least squared error
    entropy           the least Kullback-Leibler divergence between histograms, before and after

The last three choose as `ranges.py` does, on a histogram. A batch that goes beyond its ends makes it wider:
the counts of a bin are spread evenly over the bins that take its place. Each observer is of a whole tensor,
or of each channel (column) by itself.

Source: torch.ao.quantization.observer (MinMaxObserver, MovingAverageMinMaxObserver, HistogramObserver and
their per-channel versions), which tests/test_observers.py compares with. There a histogram's bin moves in 16
pieces, each as a whole.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np

from . import ranges
from .ranges import Choice, Range

BINS = 16384  # of a histogram: outliers of a language model reach a thousand times as far as most values
# Parts of the whole range that are tried: with such outliers a small one may be the best.
SHRINKS = np.geomspace(1, 1e-3, 200, dtype=np.float32)


class Observer(Protocol):
    """Looks at batches x float32 (n, channels); then knows a range float32 (1 or channels, 1)."""

    def look(self, x: np.ndarray) -> None:
        """Take a batch into account."""

    def range(self, bits: int, symmetric: bool) -> Range:
        """What a grid of so many bits should cover."""


class MinMax:
    """From the smallest value to the largest.

    rate : what a batch counts in a running mean; 1 makes it that of all batches.
    """

    def __init__(self, per: str = "tensor", *, rate: float = 1.0) -> None:
        self.per, self.rate = per, np.float32(rate)
        self.ends: Range | None = None

    def look(self, x: np.ndarray) -> None:
        """Take a batch into account."""
        v = _rows(x, self.per)
        low, high = v.min(axis=1, keepdims=True), v.max(axis=1, keepdims=True)
        if self.ends is None:
            self.ends = low, high
        elif self.rate == 1:
            self.ends = np.minimum(self.ends[0], low), np.maximum(self.ends[1], high)
        else:
            before = self.ends
            self.ends = before[0] + self.rate * (low - before[0]), before[1] + self.rate * (high - before[1])

    def range(self, bits: int, symmetric: bool) -> Range:
        """The ends."""
        return _seen(self.ends)


class Histogram:
    """Counts of values in bins of equal width, and a function of `ranges` that chooses on them.

    Attributes
    ----------
    ends : float32 (rows, 1) each, of all values so far.
    counts : float64 (rows, bins).
    """

    def __init__(self, choose: Choice, per: str = "tensor", *, bins: int = BINS) -> None:
        self.choose, self.per, self.bins = choose, per, bins
        self.ends: Range | None = None
        self.counts = np.zeros((1, bins))

    def look(self, x: np.ndarray) -> None:
        """Take a batch into account."""
        v = _rows(x, self.per)
        low, high = v.min(axis=1, keepdims=True), v.max(axis=1, keepdims=True)
        if self.ends is None:
            self.ends = low, np.maximum(high, np.nextafter(low, np.float32(np.inf)))
            self.counts = np.zeros((len(v), self.bins))
        else:
            self._widen(np.minimum(self.ends[0], low), np.maximum(self.ends[1], high))
        low, high = (end.astype(np.float64) for end in self.ends)
        place = ((v - low) * (self.bins / (high - low))).astype(np.int64).clip(0, self.bins - 1)
        place += np.arange(len(v))[:, None] * self.bins
        self.counts += np.bincount(place.reshape(-1), minlength=self.counts.size).reshape(self.counts.shape)

    def _widen(self, low: np.ndarray, high: np.ndarray) -> None:
        """Move the counts to bins between these ends."""
        before, after = _edges(*_seen(self.ends), self.bins), _edges(low, high, self.bins)
        for i in np.flatnonzero((before != after).any(axis=1)):
            below = np.concatenate([[0], np.cumsum(self.counts[i])])
            self.counts[i] = np.diff(np.interp(after[i], before[i], below))
        self.ends = low, high

    def range(self, bits: int, symmetric: bool) -> Range:
        """What `choose` makes of the middles of all bins, which count as often as they were met."""
        low, high = _seen(self.ends)
        edges = _edges(low, high, self.bins)
        middles = ((edges[:, 1:] + edges[:, :-1]) / 2).astype(np.float32)
        values = np.concatenate([low, middles, high], axis=1)
        counts = np.pad(self.counts, ((0, 0), (1, 1)))  # the ends themselves are there, and count nothing
        return self.choose(values, bits, symmetric, counts)


def _edges(low: np.ndarray, high: np.ndarray, bins: int) -> np.ndarray:
    """Ends of bins, float64 (rows, bins + 1)."""
    return np.linspace(low[:, 0].astype(np.float64), high[:, 0].astype(np.float64), bins + 1, axis=1)


def _rows(x: np.ndarray, per: str) -> np.ndarray:
    """The values (1 or channels, n) of a batch."""
    if not np.isfinite(x).all():
        raise ValueError("values that are no finite numbers")
    return x.reshape(1, -1) if per == "tensor" else x.T


def _seen(ends: Range | None) -> Range:
    if ends is None:
        raise ValueError("an observer that has seen nothing knows no range")
    return ends


OBSERVERS: dict[str, Callable[..., Observer]] = {
    "minmax": MinMax,
    "moving_average": partial(MinMax, rate=0.01),
    "percentile": lambda per, percent=99.99, **bins: Histogram(
        partial(ranges.percentile, percent=percent), per, **bins
    ),
    "mse": lambda per, **bins: Histogram(partial(ranges.mse, shrinks=SHRINKS), per, **bins),
    "entropy": partial(Histogram, ranges.entropy),
}


def make(name: str, per: str = "tensor", **options: Any) -> Observer:
    """An observer.

    Parameters
    ----------
    name : one of OBSERVERS.
    per : "tensor" or "channel".
    options : ``rate`` of moving_average, ``percent`` of percentile, ``bins`` of the histograms.
    """
    if name not in OBSERVERS:
        raise ValueError(f"unknown observer {name!r}; edgeq has {', '.join(OBSERVERS)}")
    if per not in ("tensor", "channel"):
        raise ValueError(f"an observer of each {per!r}, expected 'tensor' or 'channel'")
    return OBSERVERS[name](per=per, **options)
