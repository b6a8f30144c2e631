"""compressed-tensors: a folder whose linear layers are integers of 2, 3, 4 or 8 bits.

    int-quantized     NAME.weight              I8  (out, in)                 q, of 8 bits
    pack-quantized    NAME.weight_packed       I32 (out, in * bits / 32)     q + 2**(bits - 1), low bits first
                      NAME.weight_shape        I64 (2,)                      out, in
    both              NAME.weight_scale        F16, BF16 or F32 (out, groups), or (1,)
                      NAME.weight_zero_point   where the scheme is not symmetric: I8 (out, groups); or packed,
                                               down the columns, I32 (out * bits / 32, groups)

    w = weight_scale * (q - weight_zero_point)

A Tensor of edgeq's formats i2, i3, i4 and i8 has the same bytes. One scheme holds for all layers of a folder
here; what a scheme says of activations is left to what runs the model. Not read: other orders of the columns
(g_idx), 3 bits in words of 10 codes, as early releases packed them.

Source: compressed_tensors 0.20, compressors/pack_quantized and int_quantized.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import formats
from ..errors import FormatError
from ..tensor import Tensor
from .output import Entry
from .source import brief, shown

METHOD = "compressed-tensors"
WHOLE, PACKED = "int-quantized", "pack-quantized"
ROLES = ("weight_scale", "weight_zero_point", "weight_shape")


class Scheme(NamedTuple):
    """How the weights of linear layers are stored.

    Attributes
    ----------
    bits : of a code.
    symmetric : no zero points.
    group : columns that share a scale, or None for whole rows (or whole matrices).
    """

    bits: int
    symmetric: bool = True
    group: int | None = None

    @property
    def layout(self) -> str:
        """The layout that is written."""
        return WHOLE if self.bits == 8 else PACKED


def config(scheme: Scheme) -> dict[str, Any]:
    """The quantization_config of a folder whose linear layers, but for the output matrix, are so."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group,
    }
    return {
        "quant_method": METHOD,
        "format": scheme.layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "format": scheme.layout, "weights": weights}},
        "ignore": ["lm_head"],
    }


def read_config(path: object, raw: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config; FormatError for one that is not described above."""

    def fail(where: str, found: object, expected: str) -> FormatError:
        return FormatError(path, f"quantization_config, {where}", found=brief(found), expected=expected)

    if raw.get("format") not in (WHOLE, PACKED):
        raise fail("format", raw.get("format"), f"{WHOLE} or {PACKED}")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise fail("config_groups", groups, "one group")
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise fail("weights", weights, "an object")
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
    if weights.get("type", "int") != "int" or bits not in (2, 3, 4, 8):
        raise fail("num_bits", f"{weights.get('type')} {bits}", "int of 2, 3, 4 or 8 bits")
    if bits == 8 and raw["format"] != WHOLE or bits != 8 and raw["format"] != PACKED:
        raise fail("format", raw["format"], f"{WHOLE} with 8 bits, {PACKED} with fewer")
    if type(symmetric) is not bool:
        raise fail("symmetric", symmetric, "true or false")
    if weights.get("strategy") not in ("tensor", "channel", "group"):
        raise fail("strategy", weights.get("strategy"), "tensor, channel or group")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise fail("actorder", weights.get("actorder"), "columns in their own order")
    size = weights.get("group_size") if weights["strategy"] == "group" else None
    return Scheme(bits, symmetric, size if type(size) is int else None)


def gather(path: object, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors, with the parts of each quantized one in one place; words are given as their bytes, i8."""
    suffix = ".weight" if scheme.layout == WHOLE else ".weight_packed"
    made, used = {}, set()
    for name, tensor in tensors.items():
        if name.endswith(suffix) and tensor.format == "i8":
            base = name.removesuffix(suffix)
            made[f"{base}.weight"] = _assemble(path, base, tensor, tensors, scheme)
            used |= {name, *(f"{base}.{role}" for role in ROLES)}
    for name, tensor in tensors.items():
        if name not in used:
            if tensor.format == "i8":
                expected = f"integers in the places of {scheme.layout} only"
                raise FormatError(path, f"tensor {shown(name)}", found="integers", expected=expected)
            made[name] = tensor
    return made


def _assemble(
    path: object, base: str, codes: Tensor, tensors: Mapping[str, Tensor], scheme: Scheme
) -> Tensor:
    """The weight of a layer."""

    def fail(role: str, found: str, expected: str) -> FormatError:
        return FormatError(path, f"tensor {shown(f'{base}.{role}')}", found=found, expected=expected)

    if len(codes.shape) != 2 or codes.shape[1] * 8 % scheme.bits:
        raise fail("weight", f"shape {codes.shape} in bytes", "a matrix of whole codes")
    shape = rows, cols = codes.shape[0], codes.shape[1] * 8 // scheme.bits
    stated = tensors.get(f"{base}.weight_shape")
    if stated is not None and stated.data.tobytes() != np.array(shape, "<i8").tobytes():
        raise fail("weight_shape", "another shape", f"{shape}, which the words hold")
    scale = tensors.get(f"{base}.weight_scale")
    if scale is None or scale.format == "i8":
        raise fail("weight_scale", "none" if scale is None else "integers", "floating-point numbers")
    values = formats.dequantize(scale).reshape(scale.shape if len(scale.shape) == 2 else (-1, 1))
    if values.size == 1:
        values = np.broadcast_to(values, (rows, 1)).copy()
    if values.shape[0] != rows or not values.shape[1] or cols % values.shape[1]:
        raise fail("weight_scale", f"shape {scale.shape}", f"({rows}, groups), for {cols} columns")
    parts = {"scale": values}
    if not scheme.symmetric:
        zero = tensors.get(f"{base}.weight_zero_point")
        expected = (rows if scheme.bits == 8 else -(-rows * scheme.bits // 32)) * values.shape[1]
        if (
            zero is None
            or zero.format != "i8"
            or zero.data.nbytes != expected * (1 if scheme.bits == 8 else 4)
        ):
            raise fail(
                "weight_zero_point", "none" if zero is None else f"shape {zero.shape}", "one for each scale"
            )
        parts["zero"] = unpack_zeros(zero.data, values.shape, scheme.bits)
    return Tensor(f"{base}.weight", f"i{scheme.bits}", shape, codes.data, parts)


def entries(
    name: str,
    shape: tuple[int, ...],
    scheme: Scheme,
    codes: Callable[[], Iterable[np.ndarray]],
    parts: Mapping[str, list[np.ndarray]],
) -> list[Entry]:
    """What stands for the weight `name` of that shape; once its codes are written, `parts` holds the rest."""
    rows, cols = shape
    base, bits, groups = name.removesuffix(".weight"), scheme.bits, cols // (scheme.group or cols)
    joined = lambda part: np.concatenate(parts[part]).reshape(rows, groups)  # noqa: E731
    scale = Entry(
        f"{base}.weight_scale", "F32", (rows, groups), 4 * rows * groups, lambda: [as_bytes(joined("scale"))]
    )
    if bits == 8:
        made = [Entry(name, "I8", shape, rows * cols, codes), scale]
        zeros = ("I8", (rows, groups), rows * groups)
    else:
        words = cols * bits // 32
        stated = np.array(shape, "<i8")
        made = [
            Entry(f"{base}.weight_packed", "I32", (rows, words), 4 * rows * words, codes),
            scale,
            Entry(f"{base}.weight_shape", "I64", (2,), 16, lambda: [as_bytes(stated)]),
        ]
        words = -(-rows * bits // 32)
        zeros = ("I32", (words, groups), 4 * words * groups)
    if not scheme.symmetric:
        made.append(Entry(f"{base}.weight_zero_point", *zeros, lambda: [pack_zeros(joined("zero"), bits)]))
    return made


def as_bytes(array: np.ndarray) -> np.ndarray:
    """uint8 (nbytes,)."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)


def unpack_zeros(data: np.ndarray, shape: tuple[int, int], bits: int) -> np.ndarray:
    """Bytes of weight_zero_point -> the codes that stand for zero, uint8 (rows, groups)."""
    if bits == 8:
        return data.reshape(shape) ^ 128
    words = np.ascontiguousarray(data.view("<u4").reshape(-1, shape[1]).T)
    stored = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : shape[0] * bits]
    return np.packbits(stored.reshape(shape[1], shape[0], bits), axis=2, bitorder="little")[:, :, 0].T.copy()


def pack_zeros(zero: np.ndarray, bits: int) -> np.ndarray:
    """The inverse: uint8 (rows, groups) -> uint8 (nbytes,)."""
    if bits == 8:
        return (zero ^ 128).reshape(-1)
    codes = np.unpackbits(zero.T[:, :, None], axis=2, count=bits, bitorder="little").reshape(
        zero.shape[1], -1
    )
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 32)))
    words = np.packbits(codes, axis=1, bitorder="little").view("<u4")
    return np.ascontiguousarray(words.T).view(np.uint8).reshape(-1)
