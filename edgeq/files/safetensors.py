"""safetensors: tensors of one file, in the dtypes that weights come in.

    u64   n                             length of the header, at most 100,000,000
    char  header[n]                     JSON, from its first byte; may end in spaces
              {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [BEGIN, END]}, ...,
               "__metadata__": {"text": "text"}}
    u8    data[]                        row-major, little-endian; offsets count from here

The tensors lie one after the other, without gap or overlap, and fill the file to its end. That, the limit on
the header, unique names, and sizes that follow from the shapes are what the safetensors library guarantees;
this reader also refuses unknown fields and more than 8 dims. It exists because the library's NumPy interface
copies, and has no bfloat16.

Source: the README of huggingface/safetensors, "Format".
"""

import os
from typing import Any, NoReturn

import numpy as np

from .. import formats
from ..errors import FormatError
from ..tensor import Tensor
from . import strict_json
from .source import AGAIN, Allowance, brief, check_size, foreign, open_raw, shown

FORMATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
# bytes of integers, which only quantized checkpoints hold
WORDS = {"I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8}
FIELDS = {"dtype", "shape", "data_offsets"}
MAX_HEADER = 100_000_000


def read(
    path: str | os.PathLike, allowance: Allowance, *, mmap: bool = True, words: bool = False
) -> dict[str, Tensor]:
    """Tensors of a file, in the order of their data; a scalar is given the shape (1,).

    With `words`, tensors of integers are given as their bytes: in the format i8, the last dim that much
    longer.
    """

    def fail(where: str, found: object, expected: str, hint: str = "") -> NoReturn:
        raise FormatError(path, where, found=f"{found}", expected=expected, hint=hint)

    raw = open_raw(path, allowance, mapped=mmap)
    if raw[8:9] != b"{":
        raise foreign(path, raw, "a safetensors file")
    start = 8 + int.from_bytes(raw[:8], "little")
    if start > min(len(raw), 8 + MAX_HEADER):
        limit = f"at most {MAX_HEADER:,}, in a file of {len(raw):,} bytes"
        fail("header", f"a length of {start - 8:,} bytes", limit, AGAIN)
    entries = strict_json.parse(raw[8:start], path, "header", allowance, parse_int=_natural)

    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        fail("__metadata__", brief(metadata), "an object of texts")
    placed = []
    for name, entry in entries.items():
        where = f"tensor {shown(name)}"
        allowance.spend(path, where, 1000)
        if not isinstance(entry, dict) or entry.keys() != FIELDS:
            fail(where, brief(entry), "dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in (FORMATS | WORDS if words else FORMATS):
            fail(where, f"dtype {brief(dtype)}", f"one of {', '.join(FORMATS)}")
        if not _naturals(shape) or len(shape) > 8:
            fail(where, f"shape {brief(shape)}", "at most 8 whole numbers")
        if not _naturals(offsets) or len(offsets) != 2:
            fail(where, f"data_offsets {brief(offsets)}", "two whole numbers")
        shape = [*shape[:-1], (shape[-1] if shape else 1) * WORDS.get(dtype, 1)]
        placed.append((*offsets, name, FORMATS.get(dtype, "i8"), tuple(shape)))

    data, end, tensors = np.frombuffer(raw, np.uint8)[start:], 0, {}
    for begin, stop, name, format, shape in sorted(placed):
        where = f"tensor {shown(name)}"
        if begin != end:
            fail(where, f"data from byte {begin:,}", f"from {end:,}, where the tensor before it ends")
        nbytes = formats.get(format).BYTES
        for dim in shape:
            nbytes *= dim
            if nbytes >= 1 << 63:
                fail(where, f"shape {shape}", "less than 2^63 bytes")
        end = begin + nbytes
        if stop != end:
            fail(where, f"data up to byte {stop:,}", f"up to {end:,}, as shape {shape} in {format} needs")
        tensors[name] = Tensor(name, format, shape, data[begin:end])
    if end != len(data):
        hint = AGAIN if end > len(data) else ""
        fail("", f"{len(data):,} bytes of data", f"{end:,}, as the header says", hint)
    check_size(path, raw)
    return tensors


def _natural(text: str) -> int | None:
    """A whole number below 2^64, or None for what else JSON calls one, such as -0 or a million digits."""
    return int(text) if text.isdigit() and len(text) <= 20 and int(text) < 1 << 64 else None


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)
