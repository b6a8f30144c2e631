"""Optimizers: from gradients to steps. Parameters are float32 arrays by name, changed in place.

    AdamW (arXiv 1711.05101)    m = β₁ m + (1 - β₁) g      v = β₂ v + (1 - β₂) g²
                                w -= lr (m̂ / (√v̂ + ε) + decay w),  m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)
    SGD                         m = momentum m + g         w -= lr (m + decay w)
    Muon                        m = momentum m + g         w -= lr (0.2 √max(rows, cols) UVᵀ + decay w),
                                for g + momentum m = UΣVᵀ, of the matrices in layers; all else by AdamW

Only matrices decay: a gain or a bias has no reason to be near zero. What an optimizer remembers is in
`state`, arrays by name, so that whoever stores them can go on as if nothing had been.
"""

from collections.abc import Mapping
from math import cos, pi

import numpy as np

Arrays = Mapping[str, np.ndarray]
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # Jordan's, steep at 0


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


class Muon(AdamW):
    """All directions of a layer's matrix step equally far; what is not such a matrix is AdamW's.

    A training from nothing needs half of AdamW's steps or less.

    Sources: Jordan et al., https://kellerjordan.github.io/posts/muon, for the method; Liu et al., arXiv
    2502.16982, equation 4, for the size of a step, with which AdamW's rates and decays do for both.

    Attributes
    ----------
    momentum : of the matrices.
    """

    def __init__(self, *, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(betas=(0.9, 0.95), decay=decay)
        self.momentum = momentum

    def step(self, weights: Arrays, gradients: Arrays, rate: float) -> None:
        """Change each weight that has a gradient."""
        matrices = {name: g for name, g in gradients.items() if name.startswith("blk.") and g.ndim == 2}
        super().step(weights, {name: g for name, g in gradients.items() if name not in matrices}, rate)
        momentum = np.float32(self.momentum)
        for name, g in matrices.items():
            w = weights[name]
            m = self.state.setdefault(f"m.{name}", np.zeros_like(w))
            m *= momentum
            m += g
            w *= np.float32(1 - rate * self.decay)
            w -= np.float32(0.2 * rate * max(w.shape) ** 0.5) * orthogonal(g + momentum * m)


def orthogonal(g: np.ndarray) -> np.ndarray:
    """UVᵀ of g = UΣVᵀ, nearly: p(s) = a s + b s³ + c s⁵ five times, of each singular value of g / ‖g‖, is
    between 0.7 and 1.2 for most.
    """
    a, b, c = (np.float32(x) for x in NEWTON_SCHULZ)
    x = g / (np.linalg.norm(g) + np.float32(1e-7))
    wide = x if len(x) <= x.shape[1] else x.T
    for _ in range(5):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if len(x) <= x.shape[1] else wide.T


Optimizer = AdamW | SGD | Muon
OPTIMIZERS = {"adamw": AdamW, "sgd": SGD, "muon": Muon}


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
