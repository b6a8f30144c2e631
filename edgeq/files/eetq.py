"""EETQ checkpoints: a folder whose linear layers are 8-bit integers with a scale for each output.

    NAME.weight          I8 (in, out)    codes + 128, as the CUTLASS kernels of GPUs from Turing on take them
    NAME.weight_scales   F16 (out,)

    w[o, i] = weight_scales[o] * q[o, i]

The shape is only nominal: the bytes are those of an array (out / 2, in / 64, 2, 64), that is of pairs of
outputs which take turns every 64 inputs, and of each sixteen inputs

    0 8 1 9   2 10 3 11   4 12 5 13   6 14 7 15

follow each other: first every 16 rows of the (in, out) matrix are ordered 0 1 8 9 2 3 10 11 … for the tensor
cores, then the middle two of each four bytes change places. Inputs and outputs are multiples of 64.

Putting them back takes a copy of the weights in memory.

Source: NetEase-FuXi/EETQ, csrc/cutlass_kernels/cutlass_preprocessors, which is FasterTransformer's.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import FormatError
from ..tensor import Tensor
from . import packed
from .output import Entry
from .packed import Layer, Settings, as_bytes

METHOD = "eetq"
ROLES = ("weight_scales",)
TILE = 64
INPUTS = np.array([0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15])


class Scheme(NamedTuple):
    """How linear layers are stored: there is one way."""

    bits: int = 8


def scheme(format: str, symmetric: bool, group: int | None) -> Scheme:
    """The scheme of such integers; ValueError, of what there is, for others."""
    if format != "i8" or not symmetric or group:
        raise ValueError("8 bits in whole rows")
    return Scheme()


def config(scheme: Scheme) -> dict[str, Any]:
    """The quantization_config of a folder whose linear layers, but for the output matrix, are so."""
    return {"quant_method": METHOD, "weights": "int8", "modules_to_not_convert": ["lm_head"]}


def read_config(path: object, raw: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config; FormatError for one that is not described above."""
    Settings(path, raw).one_of("weights", "int8", default="int8")
    return Scheme()


def gather(path: object, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors, each layer's in one."""
    return packed.gather(path, tensors, "weight", ROLES, _weight)


def _weight(layer: Layer) -> Tensor:
    """The weight of a layer."""
    stored = layer.integers("weight", "u1", (None, None))
    cols, rows = stored.shape
    if not stored.size or cols % TILE or rows % TILE:
        raise layer.fail("weight", f"shape {stored.shape}", f"multiples of {TILE}")
    scale = layer.floats("weight_scales", (rows,))
    return layer.weight(put_back(stored, rows, cols), 8, scale[:, None], None)


def put_back(stored: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Codes uint8 (rows, cols) of the stored bytes."""
    runs = stored.reshape(rows // 2, cols // TILE, 2, TILE // 16, 16).swapaxes(1, 2)
    return runs[..., np.argsort(INPUTS)].reshape(rows, cols)


def spread(codes: np.ndarray) -> np.ndarray:
    """The inverse."""
    rows, cols = codes.shape
    runs = codes.reshape(rows // 2, 2, cols // TILE, TILE // 16, 16).swapaxes(1, 2)
    return runs[..., INPUTS].reshape(cols, rows)


def entries(
    tensor: Tensor,
    scheme: Scheme,
    codes: Callable[[], Iterable[np.ndarray]],
    parts: Mapping[str, list[np.ndarray]],
) -> list[Entry]:
    """What stands for a tensor; once its codes are written, `parts` holds the rest."""
    (rows, cols), base = tensor.shape, tensor.name.removesuffix(".weight")
    if rows % TILE or cols % TILE:
        found = f"{rows} rows of {cols} columns"
        raise FormatError(METHOD, f"tensor {tensor.name}", found=found, expected=f"multiples of {TILE}")

    def weight() -> list[np.ndarray]:
        return [as_bytes(spread(packed.joined(codes(), 8, tensor.shape)))]

    def scales() -> list[np.ndarray]:
        return [as_bytes(np.concatenate(parts["scale"]).reshape(-1).astype("<f2"))]

    return [
        Entry(tensor.name, "I8", (cols, rows), rows * cols, weight),
        Entry(f"{base}.weight_scales", "F16", (rows,), 2 * rows, scales),
    ]
