"""BitNet checkpoints, packed: a folder whose linear layers are -1, 0 and 1, with one scale a matrix.

    NAME.weight         U8 (out / 4, in)     bits 2k, 2k + 1 of row r: the code, 0 to 2, of output
                                             k * out / 4 + r
    NAME.weight_scale   (1,)

    w = (code - 1) / weight_scale            linear_class "bitlinear"
    w = (code - 1) * weight_scale            "autobitlinear"

A Tensor of edgeq's format ternary has codes side by side and a scale for each row. Such models are trained
with inputs of 8 bits, a scale a token, and the kernels give them these. Not read: quantization_mode
"online", weights that are still to be rounded, and norms in front of each layer (use_rms_norm).

Putting the rows back takes a copy of the weights in memory.

Source: Transformers 5.23, integrations/bitnet.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..errors import FormatError
from ..tensor import Tensor
from . import packed
from .output import Entry
from .packed import Layer, Settings, as_bytes

METHOD = "bitnet"
ROLES = ("weight_scale",)
SHIFTS = np.array([0, 2, 4, 6], np.uint8)


class Scheme(NamedTuple):
    """How linear layers are stored; inverse : weight_scale is what weights are divided by."""

    inverse: bool = False


def scheme(format: str, symmetric: bool, group: int | None) -> Scheme:
    """The scheme of such integers; ValueError, of what there is, for others."""
    if format != "ternary":
        raise ValueError("-1, 0 and 1 (ternary)")
    return Scheme()


def config(scheme: Scheme) -> dict[str, Any]:
    """The quantization_config of a folder whose linear layers, but for the output matrix, are so."""
    return {
        "quant_method": METHOD,
        "linear_class": "bitlinear" if scheme.inverse else "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }


def read_config(path: object, raw: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config; FormatError for one that is not described above."""
    settings = Settings(path, raw)
    kind = settings.one_of("linear_class", "bitlinear", "autobitlinear", default="bitlinear")
    settings.one_of("quantization_mode", "offline", default="offline")
    settings.one_of("use_rms_norm", False, default=False)
    return Scheme(kind == "bitlinear")


def gather(path: object, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors, each layer's in one."""
    return packed.gather(path, tensors, "weight", ROLES, partial(_weight, scheme=scheme))


def _weight(layer: Layer, scheme: Scheme) -> Tensor:
    """The weight of a layer."""
    stored = layer.integers("weight", "u1", (None, None))
    rows, cols = 4 * stored.shape[0], stored.shape[1]
    if not stored.size or cols % 4:
        raise layer.fail("weight", f"shape {stored.shape}", "a multiple of 4 columns")
    codes = (stored >> SHIFTS[:, None, None] & 3).reshape(rows, cols)
    if codes.max() == 3:
        row, col = np.argwhere(codes == 3)[0]
        raise layer.fail("weight", f"code 3 of output {row}, input {col}", "0, 1 and 2, for -1, 0 and 1")
    scale = layer.floats("weight_scale", (1,))
    if scheme.inverse:
        if not scale[0]:
            raise layer.fail("weight_scale", "0", "a number to divide by")
        scale = 1 / scale
    parts = {"scale": np.repeat(scale[:, None], rows, axis=0)}
    return Tensor(layer.name, "ternary", (rows, cols), packed.pack(codes, 2).reshape(-1), parts)


def entries(
    tensor: Tensor,
    scheme: Scheme,
    codes: Callable[[], Iterable[np.ndarray]],
    parts: Mapping[str, list[np.ndarray]],
) -> list[Entry]:
    """What stands for a tensor; its scales must be the same for all rows."""
    (rows, cols), base = tensor.shape, tensor.name.removesuffix(".weight")
    scale = tensor.parts["scale"]
    if rows % 4:
        raise FormatError(METHOD, f"tensor {tensor.name}", found=f"{rows} rows", expected="a multiple of 4")
    if (scale != scale.flat[0]).any():
        expected = "one for the matrix"
        raise FormatError(METHOD, f"tensor {tensor.name}", found="several scales", expected=expected)
    stated = (1 / scale if scheme.inverse else scale).reshape(-1)[:1].astype("<f4")

    def weight() -> list[np.ndarray]:
        quarters = packed.joined(codes(), 2, tensor.shape).reshape(4, -1)
        return [np.bitwise_or.reduce(quarters << SHIFTS[:, None], axis=0)]

    return [
        Entry(tensor.name, "U8", (rows // 4, cols), rows * cols // 4, weight),
        Entry(f"{base}.weight_scale", "F32", (1,), 4, lambda: [as_bytes(stated)]),
    ]
