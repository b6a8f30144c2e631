"""Optimizers: from gradients to steps. Parameters are float32 arrays by name, changed in place.

    AdamW (arXiv 1711.05101)    m = β₁ m + (1 - β₁) g      v = β₂ v + (1 - β₂) g²
                                w -= lr (m̂ / (√v̂ + ε) + decay w),  m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)
    SGD                         m = momentum m + g         w -= lr (m + decay w)

Only matrices decay: a gain or a bias has no reason to be near zero. What an optimizer remembers is in
`state`, arrays by name, so that whoever stores them can go on as if nothing had been.
"""

from collections.abc import Mapping
from math import cos, pi

import numpy as np

Arrays = Mapping[str, np.ndarray]


class AdamW:
    """Adam with decoupled weight decay.

    Attributes
    ----------
    state : "m.NAME" and "v.NAME", the running means of gradients and their squares.
    steps : taken so far.
    """

    def __init__(self, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.0):
        self.betas, self.eps, self.decay = betas, eps, decay
        self.state: dict[str, np.ndarray] = {}
        self.steps = 0

    def step(self, weights: Arrays, gradients: Arrays, rate: float) -> None:
        """Change each weight that has a gradient."""
        self.steps += 1
        b1, b2 = self.betas
        size = np.float32(rate / (1 - b1**self.steps))
        correction = np.float32((1 - b2**self.steps) ** 0.5)
        for name, g in gradients.items():
            w = weights[name]
            m, v = (self.state.setdefault(f"{kind}.{name}", np.zeros_like(w)) for kind in "mv")
            m += (1 - b1) * (g - m)
            v += (1 - b2) * (np.square(g) - v)
            if w.ndim > 1 and self.decay:
                w *= np.float32(1 - rate * self.decay)
            w -= size * m / (np.sqrt(v) / correction + np.float32(self.eps))


class SGD:
    """Gradient descent with momentum.

    Attributes
    ----------
    state : "m.NAME", the decaying sums of gradients.
    steps : taken so far.
    """

    def __init__(self, *, momentum: float = 0.9, decay: float = 0.0) -> None:
        self.momentum, self.decay = momentum, decay
        self.state: dict[str, np.ndarray] = {}
        self.steps = 0

    def step(self, weights: Arrays, gradients: Arrays, rate: float) -> None:
        """Change each weight that has a gradient."""
        self.steps += 1
        for name, g in gradients.items():
            w = weights[name]
            m = self.state.setdefault(f"m.{name}", np.zeros_like(w))
            m *= np.float32(self.momentum)
            m += g
            if w.ndim > 1 and self.decay:
                w *= np.float32(1 - rate * self.decay)
            w -= np.float32(rate) * m


Optimizer = AdamW | SGD
OPTIMIZERS = {"adamw": AdamW, "sgd": SGD}


def rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.0) -> float:
    """Learning rate of a step, from 0: up in a line for `warmup` steps, then down to `floor` times the peak,
    by a half wave of the cosine (arXiv 1608.03983).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + cos(pi * min(done, 1.0))))


def norm(gradients: Arrays) -> float:
    """Length of all gradients as one vector."""
    return float(sum(np.vdot(g, g).astype(np.float64) for g in gradients.values()) ** 0.5)


def clip(gradients: Arrays, limit: float) -> float:
    """Shorten all gradients together to that length if they are longer, in place; returns what it was."""
    length = norm(gradients)
    if length > limit:
        for g in gradients.values():
            g *= np.float32(limit / length)
    return length
