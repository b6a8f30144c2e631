"""AQLM: a folder whose linear layers are sums of codebook rows.

    NAME.codes        I8 (out, in / group, codebooks), or I16 of codebooks with more than 8 bits
    NAME.codebooks    F16, BF16 or F32 (codebooks, 2**bits, 1, group)
    NAME.scales       F16, BF16 or F32 (out, 1, 1, 1)

    w = scales * sum of codebooks[m, code] over m

Codes are signed integers to the file and count from zero all the same: -1 is the last row of a codebook, of
fewer than 8 or 16 bits, too. One scheme holds for all layers of a folder; its config lists the weights that
are plain. Not read: groups of several outputs (out_group_size), which no published checkpoint has.

Source: aqlm 1.1.7, inference.py and utils.py; Transformers' AqlmConfig.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import formats
from ..errors import FormatError
from ..formats.aqlm import Scheme
from ..tensor import Tensor
from .output import Entry
from .source import brief, shown

METHOD = "aqlm"
LIMITS = {"num_codebooks": 32, "nbits_per_codebook": 16, "in_group_size": 256}


def config(scheme: Scheme, plain: Sequence[str]) -> dict[str, Any]:
    """The quantization_config of a folder; plain: names of the weights that are not quantized."""
    modules = [name.removesuffix(".weight") for name in plain]
    return {
        "quant_method": METHOD,
        "in_group_size": scheme.group,
        "out_group_size": 1,
        "num_codebooks": scheme.codebooks,
        "nbits_per_codebook": scheme.bits,
        # Transformers 4 looks for names of weights there, 5 for those of modules
        "linear_weights_not_to_quantize": [*plain, *modules],
    }


def read_config(path: object, raw: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config; FormatError for one that is not described above."""
    found = []
    for key, limit in LIMITS.items():
        value = raw.get(key)
        if type(value) is not int or not 1 <= value <= limit:
            expected = f"a whole number from 1 to {limit}"
            raise FormatError(path, f"quantization_config, {key}", found=brief(value), expected=expected)
        found.append(value)
    if raw.get("out_group_size", 1) != 1:
        value = brief(raw["out_group_size"])
        raise FormatError(path, "quantization_config, out_group_size", found=value, expected="1")
    return Scheme(*found)


def gather(path: object, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors, with those of each quantized one in one place; integers are given as their bytes, i8."""
    made, used = {}, set()
    for name in tensors:
        if name.endswith(".codes"):
            base = name.removesuffix(".codes")
            made[f"{base}.weight"] = _assemble(path, base, tensors, scheme)
            used |= {f"{base}.{role}" for role in ("codes", "codebooks", "scales")}
    for name, tensor in tensors.items():
        if name not in used:
            if tensor.format == "i8":
                raise FormatError(
                    path, f"tensor {shown(name)}", found="integers", expected="integers in codes only"
                )
            if name in made:
                raise FormatError(
                    path, f"tensor {shown(name)}", found="it beside codes", expected="one of them"
                )
            made[name] = tensor
    return made


def _assemble(path: object, base: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """The weight of a layer."""

    def fail(role: str, found: str, expected: str) -> FormatError:
        return FormatError(path, f"tensor {shown(f'{base}.{role}')}", found=found, expected=expected)

    count, bits, group = scheme
    codes, size = tensors[f"{base}.codes"], 1 if bits <= 8 else 2
    if codes.format != "i8" or len(codes.shape) != 3 or codes.shape[2] != count * size:
        found = f"shape {codes.shape} in bytes" if codes.format == "i8" else codes.format
        raise fail("codes", found, f"(rows, groups, {count}) integers of {8 * size} bits")
    rows, groups, _ = codes.shape
    if not rows or not groups:
        raise fail("codes", f"shape {codes.shape}", "some rows and groups")
    parts = {}
    for role, shape in (("codebooks", (count, 1 << bits, 1, group)), ("scales", (rows, 1, 1, 1))):
        tensor = tensors.get(f"{base}.{role}")
        if tensor is None or tensor.format == "i8" or tensor.shape != shape:
            found = "none" if tensor is None else f"{tensor.format} of shape {tensor.shape}"
            raise fail(role, found, f"floating-point numbers of shape {shape}")
        values = formats.dequantize(tensor)
        parts[role] = values.astype(np.float16) if tensor.format == "f16" else values
    data = codes.data
    if bits not in (8, 16):  # the sign fills the upper bits
        data = (data.view("<u2" if size == 2 else np.uint8) & ((1 << bits) - 1)).view(np.uint8)
    apart = {
        "codebooks": parts["codebooks"].reshape(count, 1 << bits, group),
        "scale": parts["scales"].reshape(rows),
    }
    return Tensor(f"{base}.weight", "aqlm", (rows, groups * group), data, apart)


def entries(
    name: str, tensor: Tensor, rows: np.ndarray | None, codes: Callable[[], Iterable[np.ndarray]]
) -> list[Entry]:
    """What stands for the weight `name`, with its rows in that order; codes: their bytes."""
    base, (count, bits, group) = name.removesuffix(".weight"), formats.get("aqlm").scheme(tensor)
    shape: tuple[int, ...] = (tensor.rows, tensor.cols // group, count)
    scale = tensor.parts["scale"] if rows is None else tensor.parts["scale"][rows]
    made = [Entry(f"{base}.codes", "I8" if bits <= 8 else "I16", shape, tensor.data.nbytes, codes)]
    for role, values, shape in (
        ("codebooks", tensor.parts["codebooks"], (count, 1 << bits, 1, group)),
        ("scales", scale, (tensor.rows, 1, 1, 1)),
    ):
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        kind = "F16" if values.dtype == np.float16 else "F32"
        made.append(Entry(f"{base}.{role}", kind, shape, data.nbytes, lambda data=data: [data]))  # type: ignore[misc]
    return made
