"""Heads: what an attention layer needs to know beside its inputs."""

from typing import NamedTuple

import numpy as np


class Heads(NamedTuple):
    """Shape and options of an attention layer.

    Attributes
    ----------
    heads, kv_heads, head_dim : query heads, key/value heads (a divisor of heads), numbers in a head.
    scale : factor of the scores, usually head_dim ** -0.5.
    window : positions a token sees, itself included; 0 for all of them.
    q_norm, k_norm : gains float32 (head_dim,) of the RMS norm of queries and keys, or None.
    eps : of those norms.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    q_norm: np.ndarray | None = None
    k_norm: np.ndarray | None = None
    eps: float = 0.0
