"""Weight formats: one module each, and the module's name is the format's name.

A module states its layout in its docstring and holds

    GGML    number of the type in a GGUF file, or None
    BLOCK   weights in a block (1 for the float formats)
    BYTES   bytes of a block
    unpack(blocks) -> (codes, grid)      uint8 (n, BYTES) -> uint8 (n, BLOCK), Grid of n rows

A float format's codes are its values, and its grid is None.
"""

import importlib
import pkgutil
from functools import cache
from types import ModuleType

import numpy as np

from ..grid import Grid, decode
from ..tensor import Tensor


@cache
def names() -> tuple[str, ...]:
    """Names of all formats, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


def get(name: str) -> ModuleType:
    """The module of a format."""
    if name not in names():
        raise ValueError(f"unknown format {name!r}; edgeq has {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


@cache
def from_ggml(number: int) -> str | None:
    """Name of the format that has this number in GGUF files, or None."""
    return next((n for n in names() if number == get(n).GGML), None)


def row_bytes(name: str, cols: int) -> int:
    """Bytes of an encoded row of `cols` weights; ValueError when the row does not hold whole blocks."""
    module = get(name)
    if cols % module.BLOCK:
        raise ValueError(f"{cols} columns, {name} needs a multiple of {module.BLOCK}")
    return cols // module.BLOCK * module.BYTES


def unpack(tensor: Tensor, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, Grid | None]:
    """Codes (rows, cols) and grid of the rows start:stop of a tensor; a float format gives its values and
    None.
    """
    module = get(tensor.format)
    stop = tensor.rows if stop is None else stop
    width = row_bytes(tensor.format, tensor.cols)
    blocks = tensor.data[start * width : stop * width].reshape(-1, module.BYTES)
    codes, grid = module.unpack(blocks, **{k: v[start:stop] for k, v in tensor.parts.items()})
    rows = stop - start
    if grid is not None:
        parts = {k: a.reshape(rows, -1) for k, a in grid._asdict().items() if k != "levels" and a is not None}
        grid = grid._replace(**parts)
    return codes.reshape(rows, tensor.cols), grid


def dequantize(tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Weights of the rows start:stop as float32 (rows, cols)."""
    return decode(*unpack(tensor, start, stop))


def take(tensor: Tensor, rows: np.ndarray) -> Tensor:
    """The tensor that has only these rows, in this order (a copy of their bytes)."""
    data = tensor.data.reshape(tensor.rows, -1)[rows].reshape(-1)
    parts = {k: v[rows] for k, v in tensor.parts.items()}
    return tensor._replace(shape=(len(rows), tensor.cols), data=data, parts=parts)
