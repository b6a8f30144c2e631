"""HQQ checkpoints: a folder whose linear layers are integers with zero points that are no integers.

    NAME.W_q           the codes, of a matrix of groups, which `packing` names
        8bit_u8          U8   (n, m)
        4bit_u8          U8   (n / 2, m)    rows of the first half in the high bits, of the second in the low
        2bit_u8          U8   (n / 4, m)    rows of the first quarter in the highest bits, and so on
        1bit_u8          U8   (n / 8, m)    likewise
        3bit_32          I32  (n / 10, m)   likewise tenths, in bits 27 … 29 to 0 … 2; n rounded up to tens
    NAME.scale, .zero  F16, BF16 or F32, one for each group
    NAME.shape         I64 (2,)   out, in
    NAME.axis          I32        1: a group is a row, (out * in / group, group); 0: a column, (group, …)
    NAME.group_size    I32
    NAME.packing       U8         the letters of its name
    and further settings, of which view_as_float, quant_scale and quant_zero must be 0

    w = scale * (code - zero)

Groups that are runs of 16 or of a multiple of 32 columns of a row become i8, i4, i3, i2 or i1, with zero
points that are floats, and run as such. The others (axis 0 shares a scale between weights of different rows,
which no product of integers can use) are decoded when they are read, into the type of their scales, which is
what hqq itself computes with.

Putting codes in order takes a copy of the weights in memory.

Source: hqq 0.2.8, core/bitpack and core/quantize (HQQLinear.state_dict), which Transformers saves.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import formats
from ..tensor import Tensor
from . import packed
from .output import Entry
from .packed import Layer, Settings, as_bytes
from .source import shown

METHOD = "hqq"
FIELDS = {"8bit_u8": (8, 8), "4bit_u8": (4, 8), "2bit_u8": (2, 8), "1bit_u8": (1, 8), "3bit_32": (3, 30)}
OFF = ("view_as_float", "quant_scale", "quant_zero")
SETTINGS = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "optimize", "round_zero"),
)
ROLES = ("scale", "zero", *SETTINGS)


class Scheme(NamedTuple):
    """How linear layers are stored; on reading, each states it by itself.

    Attributes
    ----------
    bits : of a code.
    group : columns that share a scale.
    """

    bits: int = 4
    group: int = 64


def scheme(format: str, symmetric: bool, group: int | None) -> Scheme:
    """The scheme of such integers; ValueError, of what there is, for others."""
    if format not in ("i1", "i2", "i3", "i4", "i8") or group is None:
        raise ValueError("1, 2, 3, 4 or 8 bits in groups")
    return Scheme(int(format[1:]), group)


def config(scheme: Scheme) -> dict[str, Any]:
    """The quantization_config of a folder whose linear layers, but for the output matrix, are so."""
    return {
        "quant_method": METHOD,
        "quant_config": {
            "weight_quant_params": _params(scheme),
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        },
        "skip_modules": ["lm_head"],
    }


def _params(scheme: Scheme) -> dict[str, Any]:
    return {
        "nbits": scheme.bits,
        "channel_wise": True,
        "group_size": scheme.group,
        "optimize": True,
        "round_zero": False,
        "axis": 1,
        "view_as_float": False,
    }


def read_config(path: object, raw: Mapping[str, Any]) -> Scheme:
    """The layers say all themselves; FormatError where this says nothing."""
    if not isinstance(raw.get("quant_config"), dict):
        raise Settings(path, raw).fail("quant_config", "an object")
    return Scheme()


def gather(path: object, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors, each layer's in one."""
    return packed.gather(path, tensors, "W_q", ROLES, _weight)


def _weight(layer: Layer) -> Tensor:
    """The weight of a layer."""
    packing = layer.integers("packing", "u1").tobytes().decode("latin-1")
    if packing not in FIELDS:
        raise layer.fail("packing", shown(packing), ", ".join(FIELDS))
    for role in OFF:
        if role in layer and any(layer.integers(role, "u1").tobytes()):
            raise layer.fail(role, "1", "0: codes in integers, scales and zero points in floats")
    bits = FIELDS[packing][0]
    shape = rows, cols = tuple(layer.integers("shape", "<i8", (2,)).tolist())
    axis, group = (int(layer.integers(role, "<i4", (1,))[0]) for role in ("axis", "group_size"))
    if axis not in (0, 1):
        raise layer.fail("axis", f"{axis}", "0 or 1")
    if min(shape) < 1 or group < 1 or rows * cols % group:
        raise layer.fail("group_size", f"{group}, for {shape}", "one that divides the weights")
    count = rows * cols // group
    codes = _unpack(layer, packing, (count, group) if axis else (group, count))
    per_group = (count, 1) if axis else (1, count)
    scale, zero = (layer.floats(role, per_group) for role in ("scale", "zero"))
    groups = cols // group if cols % group == 0 else 0
    if axis and packed.runs(cols, groups) and cols % formats.get(f"i{bits}").BLOCK == 0:
        per_row = (rows, groups)
        return layer.weight(codes.reshape(shape), bits, scale.reshape(per_row), zero.reshape(per_row))
    w = (codes.astype(np.float32) - zero) * scale
    made = formats.quantize(layer.tensors[f"{layer.base}.scale"].format, w.reshape(shape))
    return made._replace(name=layer.name)


def _unpack(layer: Layer, packing: str, shape: tuple[int, int]) -> np.ndarray:
    """Codes uint8 of that shape."""
    bits, field = FIELDS[packing]
    n = field // bits
    stored = layer.integers("W_q", "<u4" if field > 8 else "u1", (-(-shape[0] // n), shape[1]))
    parts = [(stored >> at & (1 << bits) - 1).astype(np.uint8) for at in range(field - bits, -1, -bits)]
    if field == 8 and shape[0] % n:
        raise layer.fail("W_q", f"{shape[0]} rows of codes", f"a multiple of {n}")
    return np.concatenate(parts)[: shape[0]]


def entries(
    tensor: Tensor,
    scheme: Scheme,
    codes: Callable[[], Iterable[np.ndarray]],
    parts: Mapping[str, list[np.ndarray]],
) -> list[Entry]:
    """What stands for a tensor; once its codes are written, `parts` holds the rest."""
    (rows, cols), bits, base = tensor.shape, scheme.bits, tensor.name.removesuffix(".weight")
    packing = next(name for name, (b, _) in FIELDS.items() if b == bits)
    count, field = rows * cols // scheme.group, FIELDS[packing][1]
    n = field // bits
    packed_rows = -(-count // n)
    kind, size = ("I32", 4) if field > 8 else ("U8", 1)

    def words() -> list[np.ndarray]:
        q = packed.joined(codes(), bits, tensor.shape).reshape(count, scheme.group)
        q = np.pad(q, ((0, packed_rows * n - count), (0, 0)))
        shifts = np.arange(field - bits, -1, -bits, dtype=np.uint32)[:, None, None]
        word = np.bitwise_or.reduce(q.astype(np.uint32).reshape(n, packed_rows, -1) << shifts, axis=0)
        return [as_bytes(word.astype("<u4" if field > 8 else "u1"))]

    def floats(role: str) -> list[np.ndarray]:
        return [as_bytes(packed.part(parts, role, (count, 1), bits).astype("<f2"))]

    made = [Entry(f"{base}.W_q", kind, (packed_rows, scheme.group), packed_rows * scheme.group * size, words)]
    made += [
        Entry(f"{base}.{role}", "F16", (count, 1), 2 * count, partial(floats, role))
        for role in ("scale", "zero")
    ]
    settings = _params(scheme) | {
        "shape": np.array([rows, cols], "<i8"),
        "packing": packing,
        "unpack_view_dtype": "torch.int32" if field > 8 else "torch.uint8",
        "compute_dtype": "torch.float16",
        "quant_scale": False,
        "quant_zero": False,
        "offload_meta": False,
        "encoded_state_dict": True,
        "stores_quant_config": True,
    }
    return made + [_setting(f"{base}.{name}", value) for name, value in sorted(settings.items())]


def _setting(name: str, value: Any) -> Entry:
    """A setting as hqq encodes it: truth U8, numbers I32, text as its letters."""
    if isinstance(value, np.ndarray):
        kind, array, shape = "I64", value, value.shape
    elif isinstance(value, bool):
        kind, array, shape = "U8", np.array(value, "u1"), ()
    elif isinstance(value, int):
        kind, array, shape = "I32", np.array(value, "<i4"), ()
    else:
        kind, array = "U8", np.frombuffer(value.encode(), "u1")
        shape = array.shape
    return Entry(name, kind, shape, array.nbytes, partial(lambda data: [data], as_bytes(array)))
