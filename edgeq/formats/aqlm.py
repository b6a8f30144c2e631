"""AQLM: sums of codebook rows, and a scale for each output row. codebooks * bits / group bits per weight (2
with 2x8 or 1x16 codebooks of groups of 8), and the codebooks and scales.

    data         codes: u8 (rows, groups, codebooks), u16 of codebooks with more than 8 bits
    codebooks    f16 or f32 (codebooks, 2**bits, group), in Tensor.parts, for the whole matrix
    scale        f16 or f32 (rows,), in Tensor.parts

    w[row, group * j : group * (j + 1)] = scale[row] * sum of codebooks[m, codes[row, j, m]] over m

A group of weights is a vector here, chosen as a whole: there is no grid, and what `formats` gives of such a
tensor are its values, as of a float format.

Source: Egiazarian et al., AQLM, arXiv 2401.06118, Equation 4; the files are drawn in `files/aqlm.py`.
"""

from typing import NamedTuple

import numpy as np

from ..tensor import Tensor

GGML = None
PARTS = ("codebooks", "scale")
SHARED = "codebooks"  # the part that is not of rows


class Scheme(NamedTuple):
    """How many codebooks there are, bits of a code, and weights of a group."""

    codebooks: int = 2
    bits: int = 8
    group: int = 8


def scheme(tensor: Tensor) -> Scheme:
    """What a tensor's codebooks are."""
    count, size, group = tensor.parts["codebooks"].shape
    return Scheme(count, int(size).bit_length() - 1, group)


def codes(tensor: Tensor) -> np.ndarray:
    """u8 or u16 (rows, groups, codebooks), a view."""
    count, bits, group = scheme(tensor)
    data = tensor.data.view("<u2") if bits > 8 else tensor.data
    return data.reshape(tensor.rows, tensor.cols // group, count)


def pack(codes: np.ndarray, codebooks: np.ndarray, scale: np.ndarray) -> Tensor:
    """Tensor, without a name, of codes int (rows, groups, codebooks) and its parts."""
    rows, groups, _ = codes.shape
    kind = "<u2" if codebooks.shape[1] > 256 else np.uint8
    data = np.ascontiguousarray(codes, kind).reshape(-1).view(np.uint8)
    shape = (rows, groups * codebooks.shape[2])
    return Tensor("", "aqlm", shape, data, {"codebooks": codebooks, "scale": scale})


def decode(codes: np.ndarray, codebooks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Weights float32 (rows, cols)."""
    books = codebooks.astype(np.float32, copy=False)
    w = books[0][codes[:, :, 0]]
    for m in range(1, len(books)):
        w += books[m][codes[:, :, m]]
    w *= scale.astype(np.float32, copy=False)[:, None, None]
    return w.reshape(len(codes), -1)


def dequantize(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """Weights of some rows, float32 (rows, cols)."""
    return decode(codes(tensor)[start:stop], tensor.parts["codebooks"], tensor.parts["scale"][start:stop])


def take(tensor: Tensor, rows: np.ndarray) -> Tensor:
    """`formats.take`: the codebooks stay as they are."""
    data = tensor.data.reshape(tensor.rows, -1)[rows].reshape(-1)
    parts = {**tensor.parts, "scale": tensor.parts["scale"][rows]}
    return tensor._replace(shape=(len(rows), tensor.cols), data=data, parts=parts)
