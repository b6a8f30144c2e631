"""EETQ: 8-bit integers with a scale for each output, without any data.

    d = -w_max / 128        of a row, w_max its weight of largest magnitude, d as float16 holds it
    q = round(w / d)        -128 … 127

The published rule is d = |w_max| / 128: then a w_max that is positive wants the code 128, which there is
not, and is off by a whole step. With the sign in the scale it is always -128, and a row uses all its codes.
A file's scale may be negative; nothing that reads it minds.

Source: EETQ, github.com/NetEase-FuXi/EETQ, which quantizes as FasterTransformer's symmetric_quantize does.
"""

import os
from pathlib import Path

import numpy as np

from .. import formats
from ..convert import huggingface
from ..convert.source import open_source
from ..grid import Grid, encode

LARGEST = 128 * 65504.0  # whose scale float16 holds
LEVELS = np.arange(-128, 128, dtype=np.int8)


def eetq(w: np.ndarray) -> tuple[np.ndarray, Grid]:
    """Codes uint8 (rows, cols) and grid, a scale for each row, of weights float32 (rows, cols)."""
    largest = w[np.arange(len(w)), np.abs(w).argmax(axis=1)]
    if not (np.abs(largest) <= LARGEST).all():  # or it is NaN
        raise ValueError(f"weights up to {np.abs(largest).max():g}; EETQ holds {LARGEST:g} at most")
    grid = Grid(LEVELS, (-largest / 128).astype(np.float16).astype(np.float32)[:, None])
    return encode(w, grid), grid


def eetq_onto(format: str, w: np.ndarray) -> tuple[np.ndarray, Grid]:
    """The same, in a format of 8 bits: the scale of a row is that of each of its blocks."""
    codes, grid = eetq(w)
    if format == "i8":
        return codes, grid
    if format != "q8_0":
        raise ValueError(f"{format} does not hold what EETQ makes: take q8_0")
    blocks = w.shape[1] // formats.get(format).BLOCK
    return codes, Grid(LEVELS, np.repeat(grid.scale.astype(np.float16), blocks, axis=1))


def to_folder(src: str | os.PathLike, dst: str | os.PathLike, *, threads: int | None = None) -> Path:
    """Write a model as a folder in EETQ's layout, its linear layers so, the output matrix not."""
    source = open_source(src)
    tensors = dict(source.tensors)
    for name, tensor in tensors.items():
        if name.startswith("blk.") and len(tensor.shape) == 2:
            made = formats.pack("i8", *eetq(formats.dequantize(tensor)))
            tensors[name] = made._replace(name=name)
    source = source._replace(tensors=tensors)
    return huggingface.write(source, dst, "auto", huggingface.present(source, "eetq"), threads=threads)
