"""The header of one GGUF file, version 2 or 3.

    char  magic[4]      "GGUF"
    u32   version       2 or 3
    u64   n_tensors
    u64   n_keys
    n_keys    x  { string key;  u32 type;  value }
    n_tensors x  { string name;  u32 n_dims;  u64 dims[n_dims];  u32 ggml_type;  u64 offset }
    padding to a multiple of general.alignment (32)
    tensor data; offsets count from here, and each is a multiple of the alignment

    string   u64 length, then UTF-8          types   0 u8   1 i8   2 u16  3 i16  4 u32  5 i32  6 f32
    array    u32 type, u64 count, values             7 bool  8 string  9 array  10 u64  11 i64  12 f64

All numbers are little-endian; dims come innermost first.

Nothing in a header is believed: every length is compared with the size of the file, in Python's integers,
which do not wrap, before anything is read or allocated. Left out: arrays of arrays (no model has any),
big-endian files.

Source: ggml's docs/gguf.md; the limits on names, dims and offsets are those of ggml's own reader.
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from .. import formats
from ..errors import FormatError
from ..tensor import Tensor
from .source import AGAIN, Allowance, Raw, brief, foreign, shown

# Value types that are plain numbers, by the letter that struct and NumPy share for them.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32_TYPE, BOOL, STRING, ARRAY = 4, 7, 8, 9
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")

# Names for messages; which of these types can be read is for edgeq.formats to say.
# fmt: off
GGML_TYPES = (
    "F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S",
    "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M",
    "BF16", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "TQ1_0", "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8",
    "MXFP4", "NVFP4", "Q1_0",
)
# fmt: on

SHORT = 1024  # texts up to this length, and as many of them, are read between two charges of the allowance


class Header:
    """A header, and how far it has been read. No step leads past the end of the file."""

    def __init__(self, path: Path, raw: Raw, allowance: Allowance) -> None:
        self.path, self.raw, self.allowance = path, raw, allowance
        self.pos, self.size, self.alignment = 0, len(raw), 32
        self.kinds: dict[str, int] = {}  # type of each key's value

    def error(self, where: str, found: str, expected: str, hint: str = "") -> FormatError:
        return FormatError(self.path, where, found=found, expected=expected, hint=hint)

    # The sections, in the order of the file

    def counts(self) -> tuple[int, int]:
        """Number of tensors and of keys; the file is known to be GGUF after this."""
        if self.raw[:4] != b"GGUF":
            raise foreign(self.path, self.raw, "a GGUF file")
        self.pos = 4
        version = self.number(U32, "version")
        if version in (1 << 24, 2 << 24, 3 << 24):
            raise self.error("", "a big-endian GGUF file", "a little-endian one", "Convert the model again")
        if version not in (2, 3):
            raise self.error("version", f"{version}", "2 or 3", "Convert the model again")
        n_tensors, n_keys = self.number(U64, "number of tensors"), self.number(U64, "number of keys")
        left = self.size - self.pos
        # The least a tensor takes is 33 bytes (a letter for a name, one dim), and a key 14 (a letter, a u8).
        for what, count, least in (("tensors", n_tensors, 33), ("keys", n_keys, 14)):
            if count * least > left:
                expected = f"at most the {left // least:,} that {left:,} bytes can hold"
                raise self.error(f"number of {what}", f"{count:,}", expected, AGAIN)
        return n_tensors, n_keys

    def metadata(self, count: int) -> dict[str, Any]:
        meta: dict[str, Any] = {}
        for i in range(count):
            key = self.string(f"name of key {i}", limit=65535)
            where = f"key {shown(key)}"
            if not key or key in meta:
                raise self.error(where, "it twice" if key else "an empty name", "names, each once")
            self.allowance.spend(self.path, where, 300)
            kind = self.kinds[key] = self.number(U32, where)
            meta[key] = self.value(kind, where)
            if key == "general.alignment":
                self.set_alignment(kind, meta[key])
        return meta

    def set_alignment(self, kind: int, value: Any) -> None:
        if kind != U32_TYPE or value not in (8 << i for i in range(18)):
            expected = "a u32, a power of two from 8 to 1,048,576"
            raise self.error("key general.alignment", f"{brief(value)} of type {kind}", expected)
        self.alignment = value

    def tensors(self, count: int) -> dict[str, Tensor]:
        entries = {}
        for i in range(count):
            name = self.string(f"name of tensor {i}", limit=63)
            where = f"tensor {shown(name)}"
            if not name or name in entries:
                raise self.error(where, "it twice" if name else "an empty name", "names, each once")
            self.allowance.spend(self.path, where, 1000)
            entries[name] = self.entry(where)

        # ggml writes tensors without gaps and reads no others: each starts where the one before it ended.
        data, tensors = np.frombuffer(self.raw, np.uint8), {}
        base = end = self.padded(self.pos)
        for name, (format, shape, nbytes, offset) in entries.items():
            where, start = f"tensor {shown(name)}", base + self.padded(end - base)
            if base + offset != start:
                expected = f"{start - base:,}, where the tensor before it ends"
                raise self.error(where, f"offset {offset:,}", expected)
            end = start + nbytes
            if end > self.size:
                raise self.error(where, f"a file of {self.size:,} bytes", f"at least {end:,}", AGAIN)
            tensors[name] = Tensor(name, format, shape, data[start:end])
        return tensors

    def entry(self, where: str) -> tuple[str, tuple[int, ...], int, int]:
        """Format, shape, bytes and offset of the tensor whose name was just read."""
        n_dims = self.number(U32, where)
        if not 1 <= n_dims <= 4:
            raise self.error(where, f"{n_dims:,} dims", "1 to 4")
        shape = tuple(self.number(U64, where) for _ in range(n_dims))[::-1]
        if not 0 < math.prod(shape) < 1 << 63:
            raise self.error(where, f"shape {shape}", "positive dims whose product is below 2^63")
        kind, offset = self.number(U32, where), self.number(U64, where)
        format = formats.from_ggml(kind)
        if format is None:
            found = f"type {GGML_TYPES[kind] if kind < len(GGML_TYPES) else 'unknown'} (number {kind})"
            raise self.error(where, found, f"one of {', '.join(formats.names())}")
        try:
            row_bytes = formats.row_bytes(format, shape[-1])
        except ValueError as e:
            raise self.error(where, f"rows of {shape[-1]:,} weights", f"whole blocks ({e})") from None
        return format, shape, math.prod(shape[:-1]) * row_bytes, offset

    def padded(self, nbytes: int) -> int:
        return -(-nbytes // self.alignment) * self.alignment

    # Their pieces

    def value(self, kind: int, where: str) -> Any:
        if kind == STRING:
            return self.string(where)
        if kind != ARRAY:
            return self.numbers(kind, 1, where)[0].item()
        kind, count = self.number(U32, where), self.number(U64, where)
        return self.strings(count, where) if kind == STRING else self.numbers(kind, count, where)

    def numbers(self, kind: int, count: int, where: str) -> np.ndarray:
        if kind not in NUMBERS:
            found = "an array of arrays" if kind == ARRAY else f"value type {kind}"
            raise self.error(where, found, "one of the types 0 to 8, 10 to 12, or an array of one")
        dtype = np.dtype(f"<{NUMBERS[kind]}")
        start = self.take(count * dtype.itemsize, where)
        self.allowance.spend(self.path, where, 200 + count * dtype.itemsize)
        if kind == BOOL and np.frombuffer(self.raw, np.uint8, count, start).max(initial=0) > 1:
            raise self.error(where, "a bool that is neither 0 nor 1", "0 or 1")
        return np.frombuffer(self.raw, dtype, count, start).copy()

    def strings(self, count: int, where: str) -> list[str]:
        strings: list[str] = []
        while len(strings) < count:
            wanted = min(SHORT, count - len(strings))
            some = self.short_strings(wanted, where)
            strings += some
            if len(some) < wanted:
                strings.append(self.string(f"{where}[{len(strings)}]"))
        return strings

    def short_strings(self, count: int, where: str) -> list[str]:
        """Up to `count` strings; stops before a long or unsound one, which `string` then reads or refuses.

        A vocabulary has half a million strings, so the loop keeps to local names.
        """
        strings, raw, pos, size, length_at = [], self.raw, self.pos, self.size, U64.unpack_from
        try:
            for _ in range(count):
                (length,) = length_at(raw, pos)
                start = pos + 8
                end = start + length
                if length > SHORT or end > size:
                    break
                strings.append(raw[start:end].decode())
                pos = end
        except (struct.error, UnicodeDecodeError):
            pass
        self.pos = pos
        self.allowance.spend(self.path, where, 16 * len(strings) + sum(map(str.__sizeof__, strings)))
        return strings

    def string(self, where: str, limit: int = 1 << 30) -> str:
        length = self.number(U64, where)
        if length > limit:
            raise self.error(where, f"a text of {length:,} bytes", f"at most {limit:,}", AGAIN)
        start = self.take(length, where)
        self.allowance.spend(self.path, where, 100 + 5 * length)
        text = self.raw[start : self.pos]
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self.error(where, f"{text[:40]!r}, which is not UTF-8", "UTF-8") from None

    def number(self, kind: struct.Struct, where: str) -> Any:
        return kind.unpack_from(self.raw, self.take(kind.size, where))[0]

    def take(self, nbytes: int, where: str) -> int:
        """Step over `nbytes` bytes, and return where they begin."""
        start, left = self.pos, self.size - self.pos
        if nbytes > left:
            found = f"{nbytes:,} bytes to read at byte {start:,}"
            raise self.error(where, found, f"at most the {left:,} left in the file", AGAIN)
        self.pos += nbytes
        return start
