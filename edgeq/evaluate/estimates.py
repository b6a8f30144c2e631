"""Estimates from samples, each with its standard error.

The errors take the samples for independent, as llama-perplexity does. Tokens of one text are not quite.
"""

import math
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number and its standard error, NaN where none can be told."""

    value: float
    error: float


def mean(x: np.ndarray) -> Estimate:
    """Σ x / n, with s / √n; x (n,) numbers or booleans, of which it is the share that is true."""
    return Estimate(float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x)))


def exp_mean(x: np.ndarray) -> Estimate:
    """exp(mean(x)): perplexity, where x are -ln of probabilities."""
    m = mean(x)
    value = math.exp(m.value) if m.value < 709 else math.inf
    return Estimate(value, value * m.error)


def root_mean_square(x: np.ndarray) -> Estimate:
    """√mean(x²)."""
    square = mean(np.square(x))
    value = math.sqrt(square.value)
    return Estimate(value, square.error / (2 * value) if value else 0.0)


def correlation(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Pearson's r, NaN if one is constant, with the error (1 - r²) / √(n - 1) of normal variables."""
    dx, dy = x - x.mean(), y - y.mean()
    spread = math.sqrt(dx @ dx) * math.sqrt(dy @ dy)
    r = float(dx @ dy) / spread if spread else math.nan
    return Estimate(r, (1 - r * r) / math.sqrt(len(x) - 1))


def quantile(x: np.ndarray, q: float) -> Estimate:
    """The value below which a share q of x lies, interpolated.

    How many samples lie below the true one is binomial, whatever their distribution. The ranks one standard
    deviation to either side, looked up in x, are therefore two standard errors apart.
    """
    n = len(x)
    deviation = math.sqrt(n * q * (1 - q))
    low, high = ((n * q + side * deviation) / (n - 1) for side in (-1, 1))
    if low < 0 or high > 1:
        return Estimate(float(np.quantile(x, q)), math.nan)
    value, below, above = np.quantile(x, [q, low, high])
    return Estimate(float(value), float(above - below) / 2)
