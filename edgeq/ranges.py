"""Ranges: the interval of values that a uniform grid covers.

    minmax         all values
    percentile     all but the outermost
    mse            the least squared error
    entropy        the least Kullback-Leibler divergence between histograms, before and after
    cross_entropy  for logits: the least change of the probabilities

Each takes values float32 (n, size), the number of bits, whether the grid is symmetric, and the importance of
the values, as if each were there that many times; and gives the ends float32 (n, 1) of the n ranges. A wider
range clips less and rounds more coarsely.

Sources: Nagel et al., A White Paper on Neural Network Quantization, 2021, section 3.1 (mse, cross-entropy);
Migacz, 8-bit Inference with TensorRT, GTC 2017 (entropy).
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from .grid import inverse

Range = tuple[np.ndarray, np.ndarray]
Importance = np.ndarray | None
Choice = Callable[[np.ndarray, int, bool, Importance], Range]

SHRINKS = np.linspace(1, 0.2, 81, dtype=np.float32)  # of the whole range
BINS = 2048  # of a histogram of magnitudes
FEWEST = 1e-9  # of a bin's share, where a logarithm is taken


def levels(bits: int, symmetric: bool) -> tuple[int, int, int]:
    """The first and the last level, and the steps into which a range is divided; a symmetric one's half."""
    last = 2 ** (bits - 1) - 1
    return (-last - 1, last, max(last, 1)) if symmetric else (0, 2**bits - 1, 2**bits - 1)


def grid_parameters(low: np.ndarray, high: np.ndarray, bits: int, symmetric: bool) -> Range:
    """Scale and zero point of the grid that covers ranges, float32, shaped as they are.

    Symmetric: w = scale * q, q to 2**(bits - 1) - 1 either way, and zero point 0. Otherwise
    w = scale * (q - zero), q = 0 … 2**bits - 1, where the zero point is an integer, so that 0 is a value.
    """
    steps = np.float32(levels(bits, symmetric)[2])
    if symmetric:
        scale = np.maximum(-low, high) / steps
        return scale, np.zeros_like(scale)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / steps
    return scale, np.rint(-low * inverse(scale))


def rounded(w: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """What becomes of values on the grid of a range."""
    scale, zero = grid_parameters(low, high, bits, symmetric)
    first, last, _ = levels(bits, symmetric)
    return (np.clip(np.rint(w * inverse(scale) + zero), first, last) - zero) * scale


def minmax(w: np.ndarray, bits: int, symmetric: bool, importance: Importance = None) -> Range:
    """From the smallest value to the largest, important or not."""
    return w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)


def percentile(
    w: np.ndarray, bits: int, symmetric: bool, importance: Importance = None, *, percent: float = 99.9
) -> Range:
    """The middle `percent` of the values; of their magnitudes, if symmetric."""
    find = partial(np.percentile, axis=1, keepdims=True)
    if importance is not None:  # NumPy weighs with this method only, which takes no means of two values
        find = partial(find, weights=importance, method="inverted_cdf")
    if symmetric:
        high = find(np.abs(w), percent).astype(np.float32)
        return -high, high
    tails = (100 - percent) / 2, (100 + percent) / 2
    low, high = find(w, tails).astype(np.float32)
    return low, high


def mse(
    w: np.ndarray,
    bits: int,
    symmetric: bool,
    importance: Importance = None,
    *,
    shrinks: np.ndarray = SHRINKS,
) -> Range:
    """The part of the whole range, of those tried, with the least squared error."""
    low, high = minmax(w, bits, symmetric)
    x = np.ascontiguousarray(w.T)  # sums down the columns go from one value to the next, as the kernel's
    weight = np.float32(1) if importance is None else np.ascontiguousarray(importance.T)
    errors = [
        (weight * (x - rounded(x, low.T * s, high.T * s, bits, symmetric)) ** 2).sum(axis=0) for s in shrinks
    ]
    best = shrinks[np.argmin(errors, axis=0)][:, None]
    return low * best, high * best


def entropy(w: np.ndarray, bits: int, symmetric: bool, importance: Importance = None) -> Range:
    """Magnitudes up to the one whose histogram loses the least information.

    The histogram up to a threshold, with what lies beyond in its last bin, is compared with itself after its
    bins were merged to the 2**(bits - 1) that the grid can tell apart, each shared out evenly among the bins
    it came from that were not empty.
    """
    low, high = minmax(w, bits, symmetric)
    largest = np.maximum(-low, high)
    levels = 2 ** (bits - 1)
    place = np.minimum(np.abs(w) * inverse(largest) * BINS, BINS - 1).astype(np.int64)
    rows = np.arange(len(w))[:, None] * BINS
    weights = None if importance is None else importance.reshape(-1)
    counts = np.bincount((rows + place).reshape(-1), weights, len(w) * BINS).reshape(-1, BINS)
    counts = counts / counts.sum(axis=1, keepdims=True)
    ends = np.unique(np.maximum(levels, np.arange(BINS // 128, BINS + 1, BINS // 128)))
    best = ends[np.argmin([_divergence(counts, end, levels) for end in ends], axis=0)][:, None]
    threshold = (best * largest / BINS).astype(np.float32)
    return np.maximum(low, -threshold), np.minimum(high, threshold)


def _divergence(counts: np.ndarray, end: int, levels: int) -> np.ndarray:
    """Kullback-Leibler divergence (n,) of histograms (n, bins) cut at `end` from those of so many levels."""
    kept = counts[:, :end]
    p = kept.copy()
    p[:, -1] += counts[:, end:].sum(axis=1)
    starts = np.arange(levels) * end // levels
    widths = np.diff(np.append(starts, end))
    filled = kept > 0
    merged = np.add.reduceat(kept, starts, axis=1)
    places = np.add.reduceat(filled, starts, axis=1, dtype=np.int64)
    q = np.repeat(merged / np.maximum(places, 1), widths, axis=1) * filled
    q /= np.maximum(q.sum(axis=1, keepdims=True), FEWEST)
    return (p * np.log(np.maximum(p, FEWEST) / np.maximum(q, FEWEST))).sum(axis=1)


def cross_entropy(v: np.ndarray, bits: int, symmetric: bool, importance: Importance = None) -> Range:
    """One range for logits float32 (n, classes): the part of the whole whose probabilities have the least
    cross-entropy with the true ones.

    The grid of an output layer should keep the large logits, of which a squared error takes little account.
    """
    low, high = minmax(v.reshape(1, -1), bits, symmetric)
    p = np.exp(v - v.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)

    def loss(shrink: np.float32) -> float:
        q = rounded(v, low * shrink, high * shrink, bits, symmetric)
        top = q.max(axis=1, keepdims=True)
        log_sum = top + np.log(np.exp(q - top).sum(axis=1, keepdims=True))
        return float((p * (log_sum - q)).sum())

    best = min(SHRINKS, key=loss)
    return low * best, high * best
