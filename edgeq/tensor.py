"""Tensor: the file's own bytes, the name of their format, and the logical shape.

Everything that reads a file makes these, everything that writes or runs one takes them, and nothing else
passes between the two. The bytes are a view of the mapped file: making a Tensor reads nothing.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from .inputs import Inputs


class Tensor(NamedTuple):
    """A named array as a file stores it.

    Attributes
    ----------
    name : name in GGUF's dialect, e.g. ``"blk.0.attn_q.weight"``.
    format : module name in ``edgeq.formats``, e.g. ``"q4_k"``.
    shape : logical shape in NumPy order; a weight is (rows, cols) = (outputs, inputs).
    data : uint8 (nbytes,), C-contiguous: the encoded rows one after the other.
    parts : further arrays of formats that keep them apart from the codes, e.g. ``{"scale": f32 (rows,)}`` for
    i8.
    order : int32 (cols,), which column of the weight each stored column is, where groups that share a scale
    are no neighbors in it; None where columns are in their own order.
    inputs : how what the matrix is multiplied with is rounded; None leaves that to who computes.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    data: np.ndarray
    parts: Mapping[str, np.ndarray] = MappingProxyType({})
    order: np.ndarray | None = None
    inputs: Inputs | None = None

    @property
    def rows(self) -> int:
        """Number of encoded rows: all dimensions but the last, multiplied."""
        n = 1
        for d in self.shape[:-1]:
            n *= d
        return n

    @property
    def cols(self) -> int:
        """Length of an encoded row: the last dimension."""
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, parts included."""
        return self.data.nbytes + sum(p.nbytes for p in self.parts.values())
