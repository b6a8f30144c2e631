"""GGUF files made of bytes, sound ones and those that no writer would write.

The layout is packed here once more, independently of the reader, and every count, type and offset can be set
to a lie. `model` is the short way to a sound file.
"""

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = "BbHhIif?  Qqd"  # of struct and NumPy, by type; a string and an array have none
KIND_OF_DTYPE = {np.dtype(letter): kind for kind, letter in enumerate(LETTERS) if letter != " "}


def string(text: str | bytes) -> bytes:
    """u64 length, then the text."""
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text


def payload(kind: int, value: Any) -> bytes:
    """A value without its type; that of an array is (type of its elements, list)."""
    if kind == STRING:
        return string(value)
    if kind == ARRAY:
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(payload(element, v) for v in values)
    return struct.pack(f"<{LETTERS[kind]}", value)


def key(name: str | bytes, kind: int, value: Any) -> bytes:
    """Name, type and value of one key."""
    return string(name) + struct.pack("<I", kind) + payload(kind, value)


def info(name: str | bytes, dims: Iterable[int], kind: int = 0, offset: int = 0) -> bytes:
    """The entry of one tensor; dims innermost first."""
    dims = list(dims)
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(
    keys: Iterable[bytes] = (),
    infos: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of ready-made keys and tensor entries; counts are theirs unless given."""
    keys, infos = list(keys), list(infos)
    n_keys = len(keys) if n_keys is None else n_keys
    n_tensors = len(infos) if n_tensors is None else n_tensors
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys + infos)
    return header + bytes(-len(header) % alignment) + data


def typed(value: Any) -> tuple[int, Any]:
    """GGUF's type and value for a Python or NumPy value: int is u32, float f32."""
    if isinstance(value, np.ndarray):
        return ARRAY, (KIND_OF_DTYPE[value.dtype], value.tolist())
    if isinstance(value, list):
        return ARRAY, (STRING, value)
    return {bool: BOOL, int: U32, float: F32, str: STRING}[type(value)], value


def model(
    meta: Mapping[str, Any], tensors: Mapping[str, np.ndarray | tuple[int, tuple[int, ...], bytes]]
) -> bytes:
    """A sound file; a tensor is a float32 array, or (ggml type, shape in NumPy order, bytes)."""
    infos, data = [], b""
    for name, tensor in tensors.items():
        kind, shape, encoded = (
            (0, tensor.shape, tensor.tobytes()) if isinstance(tensor, np.ndarray) else tensor
        )
        data += bytes(-len(data) % 32)
        infos.append(info(name, shape[::-1], kind, len(data)))
        data += encoded
    return file([key(name, *typed(value)) for name, value in meta.items()], infos, data)
