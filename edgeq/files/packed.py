"""Layers that a checkpoint keeps in several tensors: found by name, checked, their codes unpacked. What the
layouts of quantized folders share.

All end in the same equation, w = scale * (code - zero), and in the formats i1, i2, i3, i4 and i8 of edgeq;
they differ in names, in the order of bits, rows and columns, and in how zero points are stored.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .. import formats
from ..errors import FormatError
from ..tensor import Tensor
from .source import brief, release, shown


class Layer:
    """The tensors BASE.ROLE of a layer, handed out with kind and shape checked."""

    def __init__(self, path: object, base: str, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.base, self.tensors = path, base, tensors

    @property
    def name(self) -> str:
        """What the weight is called where it is one tensor."""
        return f"{self.base}.weight"

    def fail(self, role: str, found: str, expected: str) -> FormatError:
        """The error for a tensor of this layer."""
        return FormatError(
            self.path, f"tensor {shown(f'{self.base}.{role}')}", found=found, expected=expected
        )

    def __contains__(self, role: str) -> bool:
        return f"{self.base}.{role}" in self.tensors

    def integers(self, role: str, kind: str, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
        """Integers of that dtype; None in the shape stands for any number."""
        tensor = self.tensors.get(f"{self.base}.{role}")
        if tensor is None or tensor.format != "i8":
            raise self.fail(role, "none" if tensor is None else "floating-point numbers", "integers")
        size = np.dtype(kind).itemsize
        if tensor.shape[-1] % size:
            raise self.fail(role, f"rows of {tensor.shape[-1]} bytes", f"integers of {size} bytes")
        values = tensor.data.view(kind).reshape(*tensor.shape[:-1], tensor.shape[-1] // size)
        self._check(role, values.shape, shape)
        return values

    def floats(self, role: str, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
        """Floating-point numbers, as float32."""
        tensor = self.tensors.get(f"{self.base}.{role}")
        if tensor is None or tensor.format == "i8":
            raise self.fail(role, "none" if tensor is None else "integers", "floating-point numbers")
        self._check(role, tensor.shape, shape)
        return formats.dequantize(tensor).reshape(tensor.shape)

    def scales(self, cols: int, rows: int, group: int | None) -> np.ndarray:
        """`scales`, stored (groups, rows), as float32 (rows, groups), of groups that the kernels have."""
        scale = self.floats("scales", (None, rows)).T
        groups = scale.shape[1]
        if groups != (1 if group is None else -(-cols // group)) or not runs(cols, groups):
            of = f"groups of {group or cols}, each 16 or a multiple of 32"
            raise self.fail("scales", f"{groups} groups of {cols} columns", of)
        return scale

    def _check(self, role: str, found: tuple[int, ...], shape: tuple[int | None, ...] | None) -> None:
        if shape is None:
            return
        if len(found) != len(shape) or any(n not in (None, m) for m, n in zip(found, shape, strict=True)):
            sizes = ", ".join("any" if n is None else str(n) for n in shape)
            raise self.fail(role, f"shape {found}", f"({sizes})")

    def weight(
        self,
        codes: np.ndarray,
        bits: int,
        scale: np.ndarray,
        zero: np.ndarray | None,
        order: np.ndarray | None = None,
    ) -> Tensor:
        """The weight, of codes (rows, cols), scale and zero (rows, groups) of columns in that order; zero
        points that are all in the middle are left out.
        """
        rows, cols = codes.shape
        parts = {"scale": np.ascontiguousarray(scale, np.float32)}
        if zero is not None and (zero != 1 << bits - 1).any():
            parts["zero"] = np.ascontiguousarray(zero)
        data = pack(codes, bits) ^ (128 if bits == 8 else 0)
        return Tensor(self.name, f"i{bits}", (rows, cols), data.reshape(-1), parts, order)


def gather(
    path: object,
    tensors: Mapping[str, Tensor],
    mark: str,
    roles: Iterable[str],
    make: Callable[[Layer], Tensor],
    *,
    is_layer: Callable[[Tensor], bool] = lambda tensor: tensor.format == "i8",
) -> dict[str, Tensor]:
    """The tensors, with those of each layer in one: `make` is called for each that has a tensor of integers
    called BASE.mark, and the memory of what it used is let go.
    """
    made: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, tensor in tensors.items():
        base = name.removesuffix(f".{mark}")
        if base != name and is_layer(tensor):
            made[f"{base}.weight"] = make(Layer(path, base, tensors))
            used |= {name, *(f"{base}.{role}" for role in roles)}
            if not np.shares_memory(made[f"{base}.weight"].data, tensor.data):
                release(tensor.data)
    for name, tensor in tensors.items():
        if name in used:
            continue
        if tensor.format == "i8":
            expected = f"integers in the places of this layout only, beside a {mark}"
            raise FormatError(path, f"tensor {shown(name)}", found="integers", expected=expected)
        if name in made:
            raise FormatError(path, f"tensor {shown(name)}", found="a weight", expected="packed ones only")
        made[name] = tensor
    return made


def runs(cols: int, groups: int) -> bool:
    """Whether the kernels have groups like these: all columns, 16 of them, or a multiple of 32."""
    return (
        groups == 1
        or bool(groups)
        and cols % groups == 0
        and (cols // groups == 16 or cols // groups % 32 == 0)
    )


def unpack(data: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 (..., n * 8 / bits) of bytes uint8 (..., n), low bits first."""
    shape = (*data.shape[:-1], -1)
    if bits == 3:
        stored = np.unpackbits(data, axis=-1, bitorder="little")
        stored = stored[..., : stored.shape[-1] // 3 * 3].reshape(*shape, 3)
        return np.packbits(stored, axis=-1, bitorder="little")[..., 0]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (data[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(shape)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse, for codes that fill bytes."""
    shape = (*codes.shape[:-1], -1)
    if bits == 3:
        stored = np.unpackbits(codes[..., None], axis=-1, count=3, bitorder="little")
        return np.packbits(stored.reshape(shape), axis=-1, bitorder="little")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(codes.reshape(*shape, 8 // bits) << shifts, axis=-1)


def joined(pieces: Iterable[np.ndarray], bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Codes uint8 (rows, cols) of the pieces of a tensor of such codes."""
    data = np.concatenate(list(pieces)).reshape(shape[0], -1)
    return unpack(data ^ np.uint8(128 if bits == 8 else 0), bits)


def part(parts: Mapping[str, list[np.ndarray]], role: str, shape: tuple[int, int], bits: int) -> np.ndarray:
    """The pieces of scales or zero points as one array (rows, groups); zero points that are not there are all
    in the middle.
    """
    if role == "zero" and role not in parts:
        return np.full(shape, 1 << bits - 1, np.uint8)
    return np.concatenate(parts[role]).reshape(shape)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """uint8 (nbytes,)."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)


class Settings:
    """A quantization_config, with every value checked as it is read."""

    def __init__(self, path: object, raw: Mapping[str, Any]) -> None:
        self.path, self.raw = path, raw

    def one_of(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """A value that is one of those."""
        value = self.raw.get(key, default)
        if not any(value == a and type(value) is type(a) for a in allowed):
            raise self.fail(key, " or ".join(str(a) for a in allowed))
        return value

    def group(self, key: str) -> int | None:
        """Columns of a group; -1 stands for all of them, None."""
        value = self.raw.get(key)
        if type(value) is not int or value < 1 and value != -1:
            raise self.fail(key, "a positive integer, or -1")
        return None if value == -1 else value

    def fail(self, key: str, expected: str) -> FormatError:
        """The error for a key."""
        found = brief(self.raw.get(key))
        return FormatError(self.path, f"quantization_config, {key}", found=found, expected=expected)
