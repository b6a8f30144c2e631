"""AWQ checkpoints, version "gemm": a folder whose linear layers are 4-bit integers, packed along the outputs.

    NAME.qweight   I32 (in, out / 8)       the codes of eight outputs in a word, from its low bits on of
                                           outputs 0, 2, 4, 6, 1, 3, 5, 7
    NAME.qzeros    I32 (groups, out / 8)   zero points, likewise
    NAME.scales    F16 (groups, out)

    w[o, i] = scales[g, o] * (code - zero)         g = i / group_size

Turning the words takes a copy of the weights in memory. Not read: the versions "gemv", "gemv_fast",
"llm-awq".

Source: AutoAWQ 0.2.9, modules/linear/gemm and utils/packing_utils.
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

METHOD = "awq"
ROLES = ("qzeros", "scales")
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
BITS = 4


class Scheme(NamedTuple):
    """How linear layers are stored; group : columns that share a scale, or None for all."""

    group: int | None = None


def scheme(format: str, symmetric: bool, group: int | None) -> Scheme:
    """The scheme of such integers; ValueError, of what there is, for others."""
    if format != "i4":
        raise ValueError("4 bits")
    return Scheme(group)


def config(scheme: Scheme) -> dict[str, Any]:
    """The quantization_config of a folder whose linear layers, but for the output matrix, are so."""
    return {
        "quant_method": METHOD,
        "bits": BITS,
        "group_size": scheme.group or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


def read_config(path: object, raw: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config; FormatError for one that is not described above."""
    # AutoAWQ's own names, beside those of Transformers
    bits, group = (
        "w_bit" if "w_bit" in raw else "bits",
        "q_group_size" if "q_group_size" in raw else "group_size",
    )
    settings = Settings(path, raw)
    settings.one_of(bits, BITS)
    settings.one_of("zero_point", True, default=True)
    version = "version" if "version" in raw else "format"
    settings.one_of(version, "gemm", "GEMM", default="gemm")
    return Scheme(settings.group(group))


def gather(path: object, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors, each layer's in one."""
    return packed.gather(path, tensors, "qweight", ROLES, partial(_weight, scheme=scheme))


def _weight(layer: Layer, scheme: Scheme) -> Tensor:
    """The weight of a layer."""
    words = layer.integers("qweight", "<u4", (None, None))
    rows, cols = words.shape[1] * 8, words.shape[0]
    if not words.size or cols % 2:
        raise layer.fail("qweight", f"shape {words.shape}", "an even number of inputs")
    scale = layer.scales(cols, rows, scheme.group)
    groups = scale.shape[1]
    zero = _unpack(layer.integers("qzeros", "<u4", (groups, rows // 8)))
    return layer.weight(_unpack(words), BITS, scale, zero)


def _unpack(words: np.ndarray) -> np.ndarray:
    """Codes uint8 (8 m, n) of words (n, m)."""
    codes = packed.unpack(np.ascontiguousarray(words).view(np.uint8), BITS)
    return np.ascontiguousarray(
        codes.reshape(len(words), -1, 8)[:, :, np.argsort(ORDER)].reshape(len(words), -1).T
    )


def _pack(codes: np.ndarray) -> np.ndarray:
    """The inverse."""
    turned = codes.T.reshape(codes.shape[1], -1, 8)[:, :, ORDER].reshape(codes.shape[1], -1)
    return packed.pack(np.ascontiguousarray(turned), BITS)


def entries(
    tensor: Tensor,
    scheme: Scheme,
    codes: Callable[[], Iterable[np.ndarray]],
    parts: Mapping[str, list[np.ndarray]],
) -> list[Entry]:
    """What stands for a tensor; once its codes are written, `parts` holds the rest."""
    (rows, cols), base = tensor.shape, tensor.name.removesuffix(".weight")
    groups = cols // (scheme.group or cols)
    if rows % 8:
        raise FormatError(METHOD, f"tensor {tensor.name}", found=f"{rows} rows", expected="a multiple of 8")

    def zeros() -> list[np.ndarray]:
        return [as_bytes(_pack(packed.part(parts, "zero", (rows, groups), BITS)))]

    def scales() -> list[np.ndarray]:
        return [as_bytes(packed.part(parts, "scale", (rows, groups), BITS).T.astype("<f2"))]

    def words() -> list[np.ndarray]:
        return [as_bytes(_pack(packed.joined(codes(), BITS, tensor.shape)))]

    return [
        Entry(f"{base}.qweight", "I32", (cols, rows // 8), cols * rows // 2, words),
        Entry(f"{base}.qzeros", "I32", (groups, rows // 8), groups * rows // 2, zeros),
        Entry(f"{base}.scales", "F16", (groups, rows), 2 * groups * rows, scales),
    ]
