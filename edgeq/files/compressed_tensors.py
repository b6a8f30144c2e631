"""compressed-tensors: a folder whose linear layers are integers of 2, 3, 4 or 8 bits.

    int-quantized     NAME.weight              I8  (out, in)                 q, of 8 bits
    pack-quantized    NAME.weight_packed       I32 (out, in * bits / 32)     q + 2**(bits - 1), low bits first
                      NAME.weight_shape        I64 (2,)                      out, in
    both              NAME.weight_scale        F16, BF16 or F32 (out, groups), or (1,)
                      NAME.weight_zero_point   where the scheme is not symmetric: I8 (out, groups); or packed,
                                               down the columns, I32 (out * bits / 32, groups)
    static inputs     NAME.input_scale         F16, BF16 or F32 (1,)
                      NAME.input_zero_point    I8 (1,), where they are not symmetric

    w = weight_scale * (q - weight_zero_point)        x = input_scale * (q - input_zero_point)

A Tensor of edgeq's formats i2, i3, i4 and i8 has the same bytes. One scheme holds for all layers of a folder
here. Inputs are left alone, or have 8 bits, and one fixed scale, or one for each token, or for each 32
columns of a token (see inputs.py). Not read: other orders of the columns (g_idx), 3 bits in words of 10
codes, as early releases packed them.

Source: compressed_tensors 0.20, compressors/pack_quantized and int_quantized.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..errors import FormatError
from ..inputs import BLOCK, Inputs
from ..tensor import Tensor
from . import packed
from .output import Entry
from .packed import Layer, as_bytes
from .source import brief

METHOD = "compressed-tensors"
WHOLE, PACKED = "int-quantized", "pack-quantized"
ROLES = ("weight_scale", "weight_zero_point", "weight_shape", "input_scale", "input_zero_point")
STRATEGIES = {"tensor": "tensor", "token": "token", "block": "group"}  # of inputs, by what shares a scale


class Scheme(NamedTuple):
    """How the weights of linear layers are stored.

    Attributes
    ----------
    bits : of a code.
    symmetric : no zero points.
    group : columns that share a scale, or None for whole rows (or whole matrices).
    whole : one scale for a matrix is written.
    short : scales are written as float16, which must hold them.
    inputs : what shares a scale of the inputs, which have 8 bits, or None where these are left alone.
    shifted : static inputs have zero points.
    """

    bits: int
    symmetric: bool = True
    group: int | None = None
    whole: bool = False
    short: bool = False
    inputs: str | None = None
    shifted: bool = False

    @property
    def layout(self) -> str:
        """The layout that is written."""
        return WHOLE if self.bits == 8 else PACKED


def scheme(format: str, symmetric: bool, group: int | None) -> Scheme:
    """The scheme of such integers; ValueError, of what there is, for others."""
    if format not in ("i2", "i3", "i4", "i8"):
        raise ValueError("2, 3, 4 or 8 bits")
    return Scheme(int(format[1:]), symmetric, group, short=group is not None)


def config(scheme: Scheme) -> dict[str, Any]:
    """The quantization_config of a folder whose linear layers, but for the output matrix, are so."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "tensor" if scheme.whole else "channel",
        "group_size": scheme.group,
    }
    group = {"targets": ["Linear"], "format": scheme.layout, "weights": weights}
    if scheme.inputs:
        group["input_activations"] = {
            "num_bits": 8,
            "type": "int",
            "symmetric": not scheme.shifted,
            "strategy": STRATEGIES[scheme.inputs],
            "group_size": BLOCK if scheme.inputs == "block" else None,
            "dynamic": scheme.inputs != "tensor",
        }
    return {
        "quant_method": METHOD,
        "format": scheme.layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
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
    whole = weights["strategy"] == "tensor"
    scheme = Scheme(bits, symmetric, size if type(size) is int else None, whole)
    if group.get("output_activations") is not None:
        raise fail("output_activations", group["output_activations"], "none")
    inputs = group.get("input_activations")
    if inputs is None:
        return scheme
    share = _share(inputs)
    if share is None:
        expected = "int of 8 bits, static by tensor, or dynamic, symmetric, by token or groups of 32"
        raise fail("input_activations", inputs, expected)
    return scheme._replace(inputs=share, shifted=not inputs.get("symmetric", True))


def _share(inputs: Any) -> str | None:
    """What shares a scale of such inputs; None for what is not known here."""
    if not isinstance(inputs, dict) or inputs.get("type", "int") != "int" or inputs.get("num_bits", 8) != 8:
        return None
    match inputs.get("dynamic", False), inputs.get("strategy"), inputs.get("symmetric", True):
        case False, "tensor" | None, bool():
            return "tensor"
        case True, "token" | None, True:
            return "token"
        case True, "group", True if inputs.get("group_size") == BLOCK:
            return "block"
    return None


def gather(path: object, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors, with the parts of each quantized one in one place; words are given as their bytes, i8."""
    mark = "weight" if scheme.layout == WHOLE else "weight_packed"
    return packed.gather(path, tensors, mark, ROLES, partial(_weight, mark=mark, scheme=scheme))


def _weight(layer: Layer, mark: str, scheme: Scheme) -> Tensor:
    """The weight of a layer: the file's own bytes."""
    data = layer.integers(mark, "u1")
    if data.ndim != 2 or data.shape[1] * 8 % scheme.bits:
        raise layer.fail(mark, f"shape {data.shape} in bytes", "a matrix of whole codes")
    shape = rows, cols = data.shape[0], data.shape[1] * 8 // scheme.bits
    if "weight_shape" in layer and layer.integers("weight_shape", "<i8").tolist() != list(shape):
        raise layer.fail("weight_shape", "another shape", f"{shape}, which the words hold")
    scale = layer.floats("weight_scale")
    scale = scale if scale.ndim == 2 else scale.reshape(-1, 1)
    if scale.size == 1:
        scale = np.broadcast_to(scale, (rows, 1)).copy()
    if scale.shape[0] != rows or not packed.runs(cols, scale.shape[1]):
        expected = f"({rows}, groups), for {cols} columns"
        raise layer.fail("weight_scale", f"shape {scale.shape}", expected)
    parts = {"scale": scale}
    if not scheme.symmetric:
        parts["zero"] = _zeros(layer, scale.shape, scheme.bits)
    kind = f"i{scheme.bits}"
    return Tensor(layer.name, kind, shape, data.reshape(-1), parts, inputs=_inputs(layer, scheme))


def _zeros(layer: Layer, shape: tuple[int, int], bits: int) -> np.ndarray:
    """The codes that stand for zero, uint8 (rows, groups)."""
    rows, groups = shape
    if bits == 8:
        return layer.integers("weight_zero_point", "u1", shape) ^ 128
    words = layer.integers("weight_zero_point", "<u4", (-(-rows * bits // 32), groups))
    return packed.unpack(np.ascontiguousarray(words.T).view(np.uint8), bits)[:, :rows].T.copy()


def _inputs(layer: Layer, scheme: Scheme) -> Inputs | None:
    """How the layer's inputs are rounded."""
    if scheme.inputs != "tensor":
        return Inputs(scheme.inputs) if scheme.inputs else None
    scale = float(layer.floats("input_scale", (1,))[0])
    if not 0 < scale < np.inf:
        raise layer.fail("input_scale", f"{scale:g}", "a finite positive number")
    zero = 0
    if scheme.shifted or "input_zero_point" in layer:
        zero = int(layer.integers("input_zero_point", "i1", (1,))[0])
    return Inputs("tensor", scale, zero)


def entries(
    tensor: Tensor,
    scheme: Scheme,
    codes: Callable[[], Iterable[np.ndarray]],
    parts: Mapping[str, list[np.ndarray]],
) -> list[Entry]:
    """What stands for a tensor; once its codes are written, `parts` holds the rest."""
    name, shape = tensor.name, tensor.shape
    rows, cols = shape
    base, bits, groups = name.removesuffix(".weight"), scheme.bits, cols // (scheme.group or cols)
    joined = partial(packed.part, parts, shape=(rows, groups), bits=bits)
    kind = np.dtype("<f2" if scheme.short else "<f4")
    stored = (1,) if scheme.whole else (rows, groups)

    def scales() -> list[np.ndarray]:
        return [as_bytes(joined("scale")[: stored[0]].astype(kind))]

    size = math.prod(stored) * kind.itemsize
    scale = Entry(f"{base}.weight_scale", f"F{8 * kind.itemsize}", stored, size, scales)
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
    inputs = tensor.inputs
    if inputs and inputs.share == "tensor":
        step, shift = np.array([inputs.scale], np.float32), np.array([inputs.zero], np.int8)
        made.append(Entry(f"{base}.input_scale", "F32", (1,), 4, lambda: [as_bytes(step)]))
        if scheme.shifted:
            made.append(Entry(f"{base}.input_zero_point", "I8", (1,), 1, lambda: [as_bytes(shift)]))
    return made


def pack_zeros(zero: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of weight_zero_point: uint8 (rows, groups) -> uint8 (nbytes,)."""
    if bits == 8:
        return (zero ^ 128).reshape(-1)
    codes = np.pad(zero, ((0, -len(zero) % 32), (0, 0))).T
    words = packed.pack(np.ascontiguousarray(codes), bits).view("<u4")[:, : -(-len(zero) * bits // 32)]
    return as_bytes(words.T)
