"""Weight formats: one module each, and the module's name is the format's name.

A module states its layout in its docstring and holds

    GGML    number of the type in a GGUF file, or None
    BLOCK   weights in a block (1 for the float formats)
    BYTES   bytes of a block
    PARTS   names of the arrays that are kept apart from the codes, where there are any
    unpack(blocks) -> (codes, grid)      uint8 (n, BYTES) -> uint8 (n, BLOCK), Grid of n rows
    fit(w, importance=None) -> grid      float32 (n, BLOCK) -> Grid of n rows, as the file can store it
    pack(codes, grid) -> blocks          the inverse of unpack
    SPACE   what fit searches, for formats whose scales are in the blocks

A float format's codes are its values, and its grid is None. Where scales are kept apart, fit takes whole rows
and `parts(grid)` gives the arrays.

Integers have names for what their fit makes, too, ``"i4-g64-asym"``: see `uniform`.

Vector codebooks are the one other family, `VECTORS`: a group of weights is one of many vectors, and the
module has `dequantize`, `take` and PARTS, but no grid.

Encoding is `fit`, then `grid.encode`, which takes the nearest codes, then `pack`; an algorithm that chooses
codes in another way needs only replace the second.
"""

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np

from .. import uniform
from ..grid import Grid, decode, encode
from ..tensor import Tensor

VECTORS = ("aqlm",)
PANEL = 1 << 18  # weights encoded together: bounds the scratch memory


@cache
def names() -> tuple[str, ...]:
    """Names of all formats but those of vector codebooks, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in VECTORS))


@cache
def get(name: str) -> ModuleType:
    """The module of a format; where the name says more, with a `fit` that does so."""
    if name in names() or name in VECTORS:
        return importlib.import_module(f"{__name__}.{name}")
    if (kind := uniform.kind(name)) is None:
        raise ValueError(f"unknown format {name!r}; edgeq has {', '.join(names())}")
    module = get(kind.format)
    bound = ModuleType(name)
    vars(bound).update(vars(module), fit=partial(module.fit, **kind.options), KIND=kind)
    return bound


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


def apart_bytes(name: str, cols: int) -> int:
    """Bytes that are kept apart from the codes of a row, as far as the name says how many."""
    kind = getattr(get(name), "KIND", None)
    groups = cols // kind.group if kind and kind.group else 0
    return groups * (2 if not kind or kind.symmetric else 3)


def unpack(tensor: Tensor, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, Grid | None]:
    """Codes (rows, cols) and grid of the rows start:stop of a tensor, columns as they are stored; a float
    format, and one of vectors, gives its values and None.
    """
    module = get(tensor.format)
    stop = tensor.rows if stop is None else stop
    if tensor.format in VECTORS:
        return module.dequantize(tensor, start, stop), None
    width = row_bytes(tensor.format, tensor.cols)
    blocks = tensor.data[start * width : stop * width].reshape(-1, module.BYTES)
    codes, grid = module.unpack(blocks, **{k: v[start:stop] for k, v in tensor.parts.items()})
    return codes.reshape(stop - start, tensor.cols), of_rows(grid, stop - start)


def pack(name: str, codes: np.ndarray, grid: Grid | None) -> Tensor:
    """Tensor, without a name, of codes (rows, cols) and the grid of the rows: the inverse of `unpack`."""
    module, (rows, cols) = get(name), codes.shape
    row_bytes(name, cols)
    apart = module.parts(grid) if parts(module) else {}
    blocks = module.pack(codes.reshape(-1, module.BLOCK), of_rows(grid, codes.size // _width(module, cols)))
    if blocks.shape[1] != module.BYTES:
        raise ValueError(
            f"the grid is not as {name} stores it: its blocks would have {blocks.shape[1]} bytes"
        )
    return Tensor("", _stored(name), (rows, cols), blocks.reshape(-1), apart)


def fit(name: str, w: np.ndarray, importance: np.ndarray | None = None, **options: Any) -> Grid | None:
    """Grid of w float32 (rows, cols), as the format can store it; None for a float format.

    importance : float32 (cols,), or one for each weight, or None.
    options : those of the format's own `fit`.
    """
    module, (rows, cols) = get(name), w.shape
    row_bytes(name, cols)
    if importance is not None:
        importance = np.broadcast_to(importance, w.shape).reshape(-1, _width(module, cols))
    return of_rows(module.fit(w.reshape(-1, _width(module, cols)), importance, **options), rows)


def _width(module: ModuleType, cols: int) -> int:
    """Columns of what a module takes for a row: a block, or a whole row where scales are kept apart."""
    return cols if parts(module) else module.BLOCK


def _stored(name: str) -> str:
    """The format of tensors that are encoded as a name says."""
    return name.partition("-")[0]


def of_rows(grid: Grid | None, rows: int) -> Grid | None:
    """The grid with its arrays (rows, …), be they blocks or rows."""
    if grid is None:
        return None
    arrays = {k: a for k, a in grid._asdict().items() if k != "levels" and a is not None}
    return grid._replace(**{k: a.reshape(rows, -1) for k, a in arrays.items()})


def dequantize(tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Weights of the rows start:stop as float32 (rows, cols)."""
    w = decode(*unpack(tensor, start, stop))
    if tensor.order is None:
        return w
    ordered = np.empty_like(w)
    ordered[:, tensor.order] = w
    return ordered


def take(tensor: Tensor, rows: np.ndarray) -> Tensor:
    """The tensor that has only these rows, in this order (a copy of their bytes)."""
    if tensor.format in VECTORS:
        return get(tensor.format).take(tensor, rows)
    data = tensor.data.reshape(tensor.rows, -1)[rows].reshape(-1)
    parts = {k: v[rows] for k, v in tensor.parts.items()}
    return tensor._replace(shape=(len(rows), tensor.cols), data=data, parts=parts)


def choose(module: ModuleType, w: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, Any]:
    """Codes uint8 (n, BLOCK) and grid of n rows for w (rows, cols), importance (cols,) or None."""
    blocks = checked(module, np.ascontiguousarray(w, np.float32)).reshape(-1, _width(module, w.shape[1]))
    space = getattr(module, "SPACE", None)
    if importance is None and space and space.rounding:
        return space.rounding(blocks, space.levels)
    if importance is not None:
        importance = np.broadcast_to(importance, w.shape).reshape(blocks.shape)
    grid = module.fit(blocks, importance)
    return encode(blocks, grid), grid


def parts(module: ModuleType) -> tuple[str, ...]:
    """Names of the arrays that a format keeps apart from the codes."""
    return getattr(module, "PARTS", ())


def checked(module: ModuleType, w: np.ndarray) -> np.ndarray:
    """w float32, if it is finite and within what the format's scales reach; else ValueError."""
    space = getattr(module, "SPACE", None)
    reach = space.reach if space else getattr(module, "LARGEST", np.finfo(np.float32).max)
    largest = max(w.max(initial=0), -w.min(initial=0))
    if not largest <= reach:  # or it is NaN
        raise ValueError(
            f"weights up to {largest:g}; {module.__name__.split('.')[-1]} holds {reach:g} at most"
        )
    return w


def quantize(
    name: str,
    w: np.ndarray,
    importance: np.ndarray | None = None,
    *,
    choose: Callable = choose,
) -> Tensor:
    """Encode a matrix.

    Parameters
    ----------
    name : of the format.
    w : float32 or float16 (..., cols), the weights, finite.
    importance : float32 (cols,), what a squared error in each column weighs: the mean of its squared inputs.
        Without it the formats that ggml encodes by plain rounding get just its bytes, and the others the
        least squared error.
    choose : what finds the codes and the grid of a panel of rows.

    Returns
    -------
    Tensor without a name.
    """
    module, cols = get(name), w.shape[-1]
    rows = w.reshape(-1, cols)
    if importance is not None and importance.shape != (cols,):
        raise ValueError(f"importance of {importance.shape}, the weights have {cols} columns")
    data = np.empty((len(rows), row_bytes(name, cols)), np.uint8)
    step = max(1, len(rows) if parts(module) else PANEL // cols)
    apart: dict[str, np.ndarray] = {}
    for start in range(0, len(rows), step):
        codes, grid = choose(module, rows[start : start + step], importance)
        blocks = module.pack(codes.reshape(-1, module.BLOCK), grid)
        data[start : start + step] = blocks.reshape(-1, data.shape[1])
        apart = module.parts(grid) if parts(module) else apart
    return Tensor("", _stored(name), w.shape, data.reshape(-1), apart)
