"""GPTQ checkpoints: a folder whose linear layers are integers of 2, 3, 4 or 8 bits, packed down the columns.

    NAME.qweight   I32 (in * bits / 32, out)       codes of an output, low bits first, one below the other
    NAME.qzeros    I32 (groups, out * bits / 32)   zero points of a group, low bits first, side by side
    NAME.scales    F16 (groups, out)
    NAME.g_idx     I32 (in,)                       group of each input; neighbors, where it is not there

    w[o, i] = scales[g, o] * (code - zero)         g = g_idx[i]

With the checkpoint_format "gptq" (v1), qzeros are less one, in words that borrow from the neighbor below a
zero of 0; with "gptq_v2" they are the zero points. Some writers say the one and mean the other: in a
symmetric checkpoint all zero points are the middle of the range, which tells.

With activation order (desc_act) the groups are no neighbors. The columns are then brought together at load,
and the tensor says so in its `order`: each product with it first brings the inputs into that order, which is
one read and one write of each.

Turning the words takes a copy of the weights in memory. Not read: the planar layout "gptq_p", and
"dynamic", other settings for some layers.

Source: AutoGPTQ 0.7, qlinear_cuda; GPTQModel 7.7, nn_modules/qlinear/torch and utils/model.
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

METHOD = "gptq"
ROLES = ("qzeros", "scales", "g_idx")


class Scheme(NamedTuple):
    """How linear layers are stored.

    Attributes
    ----------
    bits : of a code.
    symmetric : all zero points are the middle.
    group : columns that share a scale, or None for all.
    v2 : zero points are stored as they are.
    ordered : groups may be no neighbors.
    """

    bits: int
    symmetric: bool = True
    group: int | None = None
    v2: bool = False
    ordered: bool = False


def scheme(format: str, symmetric: bool, group: int | None) -> Scheme:
    """The scheme of such integers; ValueError, of what there is, for others."""
    if format not in ("i2", "i3", "i4", "i8"):
        raise ValueError("2, 3, 4 or 8 bits")
    return Scheme(int(format[1:]), symmetric, group)


def config(scheme: Scheme) -> dict[str, Any]:
    """The quantization_config of a folder whose linear layers, but for the output matrix, are so."""
    return {
        "quant_method": METHOD,
        "bits": scheme.bits,
        "group_size": scheme.group or -1,
        "sym": scheme.symmetric,
        "desc_act": scheme.ordered,
        "lm_head": False,
        "checkpoint_format": "gptq_v2" if scheme.v2 else "gptq",
    }


def read_config(path: object, raw: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config; FormatError for one that is not described above."""
    settings = Settings(path, raw)
    bits = settings.one_of("bits", 2, 3, 4, 8)
    symmetric = settings.one_of("sym", True, False, default=True)
    version = settings.one_of("checkpoint_format", "gptq", "gptq_v2", default="gptq")
    if raw.get("dynamic"):
        raise settings.fail("dynamic", "the same settings for all layers")
    return Scheme(bits, symmetric, settings.group("group_size"), version == "gptq_v2")


def gather(path: object, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors, each layer's in one."""
    return packed.gather(path, tensors, "qweight", ROLES, partial(_weight, scheme=scheme))


def _weight(layer: Layer, scheme: Scheme) -> Tensor:
    """The weight of a layer."""
    bits = scheme.bits
    words = layer.integers("qweight", "<u4", (None, None))
    rows, cols = words.shape[1], words.shape[0] * 32 // bits
    if not words.size or words.shape[0] * 32 % bits or rows * bits % 32:
        raise layer.fail("qweight", f"shape {words.shape}", f"words that whole codes of {bits} bits fill")
    scale = layer.scales(cols, rows, scheme.group)
    groups = scale.shape[1]
    zero = _zeros(layer.integers("qzeros", "<u4", (groups, rows * bits // 32)), scheme)
    order = _order(layer, cols, groups)
    codes = packed.unpack(np.ascontiguousarray(words.T).view(np.uint8), bits)
    codes = codes if order is None else np.take(codes, order, axis=1)
    return layer.weight(codes, bits, scale, zero, order)


def _zeros(words: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Zero points uint8 (rows, groups)."""
    stored = packed.unpack(np.ascontiguousarray(words).view(np.uint8), scheme.bits).T
    middle, v2 = 1 << scheme.bits - 1, scheme.v2
    if scheme.symmetric and (stored == stored.flat[0]).all() and stored.flat[0] in (middle - 1, middle):
        v2 = bool(stored.flat[0] == middle)
    if v2:
        return stored
    if scheme.bits == 3:  # across words: GPTQModel adds to each alone, too
        return stored + np.uint8(1) & 7
    # a zero point of 0 was stored by a subtraction that borrowed from the next
    whole = words + np.uint32(sum(1 << at for at in range(0, 32, scheme.bits)))
    return packed.unpack(np.ascontiguousarray(whole).view(np.uint8), scheme.bits).T


def _order(layer: Layer, cols: int, groups: int) -> np.ndarray | None:
    """The order that brings the columns of each group together, None if they are."""
    if "g_idx" not in layer:
        return None
    group = layer.integers("g_idx", "<i4", (cols,))
    if group.min() < 0 or group.max() >= groups:
        outside = group[(group < 0) | (group >= groups)][0]
        raise layer.fail("g_idx", f"group {outside}", f"groups 0 to {groups - 1}")
    sizes = np.bincount(group, minlength=groups)
    if (sizes != cols // groups).any():
        raise layer.fail("g_idx", f"groups of {sizes.min()} to {sizes.max()}", f"all of {cols // groups}")
    if (np.diff(group) >= 0).all():
        return None
    return np.argsort(group, kind="stable").astype(np.int32)


def entries(
    tensor: Tensor,
    scheme: Scheme,
    codes: Callable[[], Iterable[np.ndarray]],
    parts: Mapping[str, list[np.ndarray]],
) -> list[Entry]:
    """What stands for a tensor; once its codes are written, `parts` holds the rest."""
    (rows, cols), bits, base = tensor.shape, scheme.bits, tensor.name.removesuffix(".weight")
    groups = cols // (scheme.group or cols)
    if rows * bits % 32 or cols * bits % 32:
        found = f"{rows} rows of {cols} columns"
        expected = f"multiples of {32 if bits == 3 else 32 // bits}, whose codes fill words"
        raise FormatError(METHOD, f"tensor {tensor.name}", found=found, expected=expected)
    group = np.arange(cols, dtype=np.int32) // (scheme.group or cols)
    if tensor.order is not None:
        group[tensor.order] = group.copy()

    def words() -> list[np.ndarray]:
        q = packed.joined(codes(), bits, tensor.shape)
        if tensor.order is not None:
            q = np.take(q, np.argsort(tensor.order), axis=1)
        return [as_bytes(packed.pack(q, bits).view("<u4").T)]

    def zeros() -> list[np.ndarray]:
        zero = packed.part(parts, "zero", (rows, groups), bits)
        stored = packed.pack(np.ascontiguousarray(zero.T), bits).view("<u4")
        if not scheme.v2 and bits == 3:
            stored = packed.pack(np.ascontiguousarray(zero.T - np.uint8(1) & 7), bits).view("<u4")
        elif not scheme.v2:
            stored = stored - np.uint32(sum(1 << at for at in range(0, 32, bits)))
        return [as_bytes(stored)]

    def scales() -> list[np.ndarray]:
        return [as_bytes(packed.part(parts, "scale", (rows, groups), bits).T.astype("<f2"))]

    return [
        Entry(f"{base}.qweight", "I32", (cols * bits // 32, rows), rows * cols * bits // 8, words),
        Entry(f"{base}.qzeros", "I32", (groups, rows * bits // 32), groups * rows * bits // 8, zeros),
        Entry(f"{base}.scales", "F16", (groups, rows), 2 * groups * rows, scales),
        Entry(f"{base}.g_idx", "I32", (cols,), 4 * cols, lambda: [as_bytes(group)]),
    ]
