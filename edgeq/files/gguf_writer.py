"""GGUF, written: one file, or parts of a limited size. `gguf_header` draws the layout.

Nothing is held but the header and the piece of a tensor that is about to be written, so a model may be larger
than memory. Parts are named and filled as llama-gguf-split does it: metadata in the first, a new part when
the next tensor would make this one too large.

Metadata is Python's: str, bool, int, float, lists of str or of arrays, and arrays of NumPy. A number of NumPy
is written as the type it is, an int as u32 when it fits, a float as f32.
"""

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EdgeqError
from .gguf_header import ARRAY, NUMBERS, STRING, U32, U64
from .output import Entry, Progress, durable, parts, reporter, whole, write_tensors
from .source import shown

KIND_OF = {np.dtype(f"<{letter}"): kind for kind, letter in NUMBERS.items()}
INTEGERS = (np.uint32, np.int32, np.uint64, np.int64)  # the first that holds an int is its type


def write(
    path: str | os.PathLike,
    meta: Mapping[str, Any],
    entries: Iterable[Entry],
    *,
    max_size: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a model; either all of its files appear, or none.

    Parameters
    ----------
    path : the file. A model that takes several is written to NAME-00001-of-0000N.gguf and so on.
    meta : GGUF's keys in the order in which they are to stand.
    entries : the tensors, likewise.
    max_size : most bytes of tensors in a file; None writes one file.
    progress : called with ("writing", bytes written, bytes of all tensors).

    Returns
    -------
    The files.
    """
    path = Path(path)
    alignment = int(meta.get("general.alignment", 32))
    files = parts(list(entries), max_size, alignment)
    headers = [_header(keys, held, alignment) for keys, held in zip(_keys(meta, files), files, strict=True)]
    paths = [path]
    if len(files) > 1:
        stem = path.name.removesuffix(".gguf")
        paths = [path.with_name(f"{stem}-{i + 1:05}-of-{len(files):05}.gguf") for i in range(len(files))]
    total = sum(entry.nbytes for held in files for entry in held)
    report = reporter(progress, total)
    needed = sum(map(len, headers)) + total + alignment * sum(map(len, files))
    with whole(*paths, nbytes=needed) as unfinished:
        for new, header, held in zip(unfinished, headers, files, strict=True):
            with durable(new) as f:
                f.write(header)
                write_tensors(f, held, report, alignment)
    return paths


def _keys(meta: Mapping[str, Any], files: Sequence[Sequence[Entry]]) -> list[dict[str, Any]]:
    """The metadata of each file."""
    if len(files) == 1:
        return [dict(meta)]
    everywhere: dict[str, Any] = {k: v for k, v in meta.items() if k == "general.alignment"}
    everywhere |= {
        "split.count": np.uint16(len(files)),
        "split.tensors.count": np.int32(sum(map(len, files))),
    }
    return [{**({} if i else meta), "split.no": np.uint16(i), **everywhere} for i in range(len(files))]


def _header(meta: Mapping[str, Any], entries: Sequence[Entry], alignment: int) -> bytes:
    """All bytes before the first tensor's."""
    out = [b"GGUF", U32.pack(3), U64.pack(len(entries)), U64.pack(len(meta))]
    for key, value in meta.items():
        kind, payload = _value(value)
        out += _string(key), U32.pack(kind), payload
    offset = 0
    for entry in entries:
        name, dims = entry.name, entry.shape[::-1]
        if len(name.encode()) > 63 or not 1 <= len(dims) <= 4:
            raise EdgeqError(f"GGUF has no room for tensor {shown(name)} of shape {entry.shape}")
        out += _string(name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.type, offset)
        offset += entry.nbytes + -entry.nbytes % alignment
    header = b"".join(out)
    return header + bytes(-len(header) % alignment)


def _value(value: Any) -> tuple[int, bytes]:
    """Type and bytes of a value."""
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return ARRAY, U32.pack(STRING) + U64.pack(len(value)) + b"".join(map(_string, value))
    if isinstance(value, list) or np.ndim(value) > 1:  # an array of arrays
        kinds, payloads = zip(*map(_value, value), strict=True)
        if {*kinds} != {ARRAY}:
            raise ValueError("a list of neither texts nor arrays: numbers are for arrays of NumPy")
        return ARRAY, U32.pack(ARRAY) + U64.pack(len(value)) + b"".join(payloads)
    if isinstance(value, bool):
        value = np.bool_(value)
    elif isinstance(value, int):
        value = next(kind for kind in INTEGERS if np.iinfo(kind).min <= value <= np.iinfo(kind).max)(value)
    elif not isinstance(value, np.generic | np.ndarray):
        value = np.float32(value)
    kind, data = KIND_OF[value.dtype.newbyteorder("<")], value.tobytes()
    return (ARRAY, U32.pack(kind) + U64.pack(len(value)) + data) if value.ndim else (kind, data)


def _string(text: str) -> bytes:
    data = text.encode()
    return U64.pack(len(data)) + data
