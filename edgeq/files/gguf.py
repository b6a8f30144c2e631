"""GGUF, versions 2 and 3: metadata and tensors of a model in one file, or in several.

    char  magic[4]      "GGUF"
    u32   version       2 or 3
    u64   n_tensors
    u64   n_keys
    n_keys    x  { string key;  u32 type;  value }
    n_tensors x  { string name;  u32 n_dims;  u64 dims[n_dims];  u32 ggml_type;  u64 offset }
    padding to a multiple of general.alignment (32)
    tensor data; offset counts from here, and each tensor starts at a multiple of the alignment

    string   u64 length, then UTF-8          types   0 u8   1 i8   2 u16  3 i16  4 u32  5 i32  6 f32
    array    u32 type, u64 count, values             7 bool  8 string  9 array  10 u64  11 i64  12 f64

All numbers are little-endian; dims come innermost first. A split model is several such files named
``-00001-of-0000N.gguf``: the first has the metadata, each has tensors of its own.

Nothing in a header is believed: every length is compared with the size of the file, in Python's integers, which do
not wrap, before anything is read or allocated. Left out: arrays of arrays (no model has any), big-endian files.

Source: ggml's docs/gguf.md; the limits on names, dims and offsets are those of ggml itself.
"""

import math
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .. import formats
from ..errors import FormatError
from ..tensor import Tensor
from .source import Allowance, Raw, check_size, foreign, inside, open_raw, shown

Meta = dict[str, Any]
Tensors = dict[str, Tensor]

# Value types that are plain numbers, by the letter that struct and NumPy share for them.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U32_TYPE, BOOL, STRING, ARRAY = 4, 7, 8, 9
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")

# Names for messages only: which of these types can be read is decided by edgeq.formats.
GGML_TYPES = (
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL "
    "IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 IQ4_NL_4_8 "
    "IQ4_NL_8_8 MXFP4 NVFP4 Q1_0"
).split()

MAX_PARTS = 512  # each part holds a file descriptor, and systems give about a thousand
SHORT = 1024  # strings up to this length, and as many of them, are read between two charges of the allowance
PART_NAME = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
INCOMPLETE = "The file may be an incomplete download"


def read(path: str | os.PathLike, *, mmap: bool = True) -> tuple[Meta, Tensors]:
    """Read the header of a GGUF file, and map its tensors.

    Parameters
    ----------
    path : the file; any part of a split model stands for all of it.
    mmap : map the file (the default), or read all of it now: slower, but safe where the file may change.

    Returns
    -------
    meta : GGUF's keys. Numbers, bools and strings as Python's, arrays of strings as lists, other arrays as NumPy
        arrays of the stored type. Keys that describe a split are left out: its parts are together again.
    tensors : name -> Tensor.

    Raises
    ------
    FormatError : when the file is anything but a sound GGUF file of tensors that edgeq can read.
    """
    path, allowance = Path(path), Allowance()
    meta, tensors = _read_file(path, allowance, mmap)
    if _integer(path, meta, "split.count", 0) > 1:
        meta, tensors = _gather(path, meta, tensors, allowance, mmap)
    return {key: value for key, value in meta.items() if not key.startswith("split.")}, tensors


def _gather(
    path: Path, meta: Meta, tensors: Tensors, allowance: Allowance, mmap: bool
) -> tuple[Meta, Tensors]:
    """The metadata of the first part of a split model and the tensors of all; those of the part `path` are known."""
    count, total = meta["split.count"], _integer(path, meta, "split.tensors.count")
    first, gathered = meta, {}
    for number, part in enumerate(_part_paths(path, count)):
        part_meta, part_tensors = (meta, tensors) if part == path else _read_file(part, allowance, mmap)
        if number == 0:
            first = part_meta
        for key, expected in {"split.no": number, "split.count": count, "split.tensors.count": total}.items():
            found = _integer(part, part_meta, key)
            if found != expected:
                raise FormatError(part, f"key {key}", found=f"{found}", expected=f"{expected}")
        for name in part_tensors.keys() & gathered.keys():
            raise FormatError(part, f"tensor {shown(name)}", found="it in two parts", expected="it in one")
        gathered |= part_tensors
    if len(gathered) != total:
        raise FormatError(
            path, "", found=f"{len(gathered):,} tensors in {count} parts", expected=f"{total:,}"
        )
    return first, gathered


def _part_paths(path: Path, count: int) -> list[Path]:
    """Paths of all parts of a split model, from the path of one."""
    name = PART_NAME.fullmatch(path.name)
    if not name or int(name[3]) != count or count > MAX_PARTS:
        raise FormatError(
            path,
            "key split.count",
            found=f"{count} parts in a file of this name",
            expected=f"a name like -00001-of-{count:05}.gguf, and at most {MAX_PARTS} parts",
            hint="Give the parts their own names back",
        )
    parts = [path.with_name(f"{name[1]}{i:05}-of-{name[3]}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in parts if not p.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        found = f"no {', '.join(missing[:3])}{more} beside it"
        raise FormatError(
            path, "", found=found, expected=f"all {count} parts of the model", hint="Fetch the rest"
        )
    return [inside(p, (path.parent, path.resolve().parent)) for p in parts]


def _integer(path: Path, meta: Meta, key: str, default: int | None = None) -> int:
    """Value of a key that must be a whole number."""
    value = meta.get(key, default)
    if type(value) is not int:
        found = "none" if value is None else type(value).__name__
        raise FormatError(path, f"key {key}", found=found, expected="a whole number")
    return value


def _read_file(path: Path, allowance: Allowance, mmap: bool) -> tuple[Meta, Tensors]:
    """Metadata and tensors of one file."""
    raw = open_raw(path, allowance, mapped=mmap)
    header = _Header(path, raw, allowance)
    n_tensors, n_keys = header.counts()
    meta = header.metadata(n_keys)
    tensors = header.tensors(n_tensors)
    check_size(path, raw)
    return meta, tensors


class _Header:
    """The header of one file, and how far it has been read. No step leads past the end of the file."""

    def __init__(self, path: Path, raw: Raw, allowance: Allowance) -> None:
        self.path, self.raw, self.allowance = path, raw, allowance
        self.pos, self.size, self.alignment = 0, len(raw), 32

    def error(self, where: str, found: str, expected: str, hint: str = "") -> FormatError:
        return FormatError(self.path, where, found=found, expected=expected, hint=hint)

    # ---- the pieces -------------------------------------------------------------------------------------------

    def take(self, nbytes: int, where: str) -> int:
        """Step over `nbytes` bytes, and return where they begin."""
        start, left = self.pos, self.size - self.pos
        if nbytes > left:
            found = f"{nbytes:,} bytes to read at byte {start:,}"
            raise self.error(where, found, f"at most the {left:,} left in the file", INCOMPLETE)
        self.pos += nbytes
        return start

    def number(self, kind: struct.Struct, where: str) -> Any:
        return kind.unpack_from(self.raw, self.take(kind.size, where))[0]

    def string(self, where: str, limit: int = 1 << 30) -> str:
        length = self.number(U64, where)
        if length > limit:
            raise self.error(where, f"a text of {length:,} bytes", f"at most {limit:,}", INCOMPLETE)
        start = self.take(length, where)
        self.allowance.spend(self.path, where, 100 + 4 * length)
        text = self.raw[start : self.pos]
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self.error(where, f"bytes that are not UTF-8, {shown(text[:40])}", "UTF-8") from None

    def strings(self, count: int, where: str) -> list[str]:
        strings: list[str] = []
        while len(strings) < count:
            want = min(SHORT, count - len(strings))
            some = self.short_strings(want, where)
            strings += some
            if len(some) < want:
                strings.append(self.string(f"{where}[{len(strings)}]"))
        return strings

    def short_strings(self, count: int, where: str) -> list[str]:
        """Up to `count` strings; stops before one that is long or unsound, which `string` then reads or refuses.

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
        self.allowance.spend(self.path, where, 16 * len(strings) + sum(map(sys.getsizeof, strings)))
        return strings

    def value(self, kind: int, where: str) -> Any:
        if kind == STRING:
            return self.string(where)
        if kind == ARRAY:
            kind, count = self.number(U32, where), self.number(U64, where)
            if kind == STRING:
                return self.strings(count, where)
            return self.numbers(kind, count, where)
        return self.numbers(kind, 1, where)[0].item()

    def numbers(self, kind: int, count: int, where: str) -> np.ndarray:
        if kind not in NUMBERS:
            found = "an array in an array" if kind == ARRAY else f"value type {kind}"
            raise self.error(where, found, "one of GGUF's types 0 to 8 and 10 to 12")
        dtype = np.dtype(f"<{NUMBERS[kind]}")
        start = self.take(count * dtype.itemsize, where)
        self.allowance.spend(self.path, where, 200 + self.pos - start)
        if kind == BOOL and count and np.frombuffer(self.raw, np.uint8, count, start).max() > 1:
            raise self.error(where, "a bool that is neither 0 nor 1", "0 or 1")
        return np.frombuffer(self.raw, dtype, count, start).copy()

    # ---- the sections, in the order of the file ---------------------------------------------------------------

    def counts(self) -> tuple[int, int]:
        """Number of tensors and of keys; the file is known to be GGUF after this."""
        if self.raw[:4] != b"GGUF":
            raise foreign(self.path, self.raw, "a GGUF file")
        self.pos = 4
        version = self.number(U32, "version")
        if version in (1 << 24, 2 << 24, 3 << 24):
            raise self.error(
                "", "a big-endian GGUF file", "a little-endian one", "Convert it again without that option"
            )
        if version not in (2, 3):
            raise self.error(
                "version", f"{version}", "2 or 3", "Convert the model again" if version == 1 else ""
            )
        n_tensors, n_keys = self.number(U64, "number of tensors"), self.number(U64, "number of keys")
        left = self.size - self.pos
        # The smallest tensor entry is 33 bytes (a name of one letter, one dim), the smallest key 14 (a letter, a u8).
        for what, count, least in (("tensors", n_tensors, 33), ("keys", n_keys, 14)):
            if count * least > left:
                found, expected = f"{count:,}", f"at most the {left // least:,} that {left:,} bytes can hold"
                raise self.error(f"number of {what}", found, expected, INCOMPLETE)
        return n_tensors, n_keys

    def metadata(self, count: int) -> Meta:
        meta: Meta = {}
        for i in range(count):
            key = self.string(f"name of key {i}", limit=65535)
            where = f"key {shown(key)}"
            if not key or key in meta:
                raise self.error(where, "it twice" if key else "an empty name", "names, each once")
            self.allowance.spend(self.path, where, 300)
            kind = self.number(U32, where)
            meta[key] = self.value(kind, where)
            if key == "general.alignment":
                self.set_alignment(kind, meta[key])
        return meta

    def set_alignment(self, kind: int, value: Any) -> None:
        if kind != U32_TYPE or value not in (8 << i for i in range(18)):
            expected = "a u32, a power of two from 8 to 1,048,576"
            raise self.error("key general.alignment", f"{shown(str(value))} of type {kind}", expected)
        self.alignment = value

    def tensors(self, count: int) -> Tensors:
        entries = {}
        for i in range(count):
            name = self.string(f"name of tensor {i}", limit=63)
            where = f"tensor {shown(name)}"
            if not name or name in entries:
                raise self.error(where, "it twice" if name else "an empty name", "names, each once")
            self.allowance.spend(self.path, where, 1000)
            entries[name] = self.entry(where)

        # ggml writes tensors without gaps, and reads no other files: each must start where the one before it ended.
        data, end, tensors = np.frombuffer(self.raw, np.uint8), 0, {}
        base = self.padded(self.pos)
        for name, (format, shape, nbytes, offset) in entries.items():
            where, start = f"tensor {shown(name)}", self.padded(end)
            if offset != start:
                raise self.error(where, f"offset {offset:,}", f"{start:,}, right after the tensor before")
            end = start + nbytes
            if base + end > self.size:
                found, expected = f"a file of {self.size:,} bytes", f"at least {base + end:,}"
                raise self.error(where, found, expected, INCOMPLETE)
            tensors[name] = Tensor(name, format, shape, data[base + start : base + end])
        return tensors

    def entry(self, where: str) -> tuple[str, tuple[int, ...], int, int]:
        """Format, shape, bytes and offset of the tensor whose entry comes next."""
        n_dims = self.number(U32, where)
        if not 1 <= n_dims <= 4:
            raise self.error(where, f"{n_dims:,} dims", "1 to 4")
        shape = tuple(self.number(U64, where) for _ in range(n_dims))[::-1]
        kind, offset = self.number(U32, where), self.number(U64, where)
        if not 0 < math.prod(shape) < 1 << 63:
            raise self.error(where, f"shape {shape}", "positive dims whose product is below 2^63")
        format = formats.from_ggml(kind)
        if format is None:
            name = GGML_TYPES[kind] if kind < len(GGML_TYPES) else "unknown"
            known = sorted(formats.names())
            raise self.error(where, f"type {name} ({kind})", f"one of {', '.join(known)}")
        try:
            nbytes = math.prod(shape[:-1]) * formats.row_bytes(format, shape[-1])
        except ValueError as e:
            raise self.error(where, f"{shape[-1]:,} columns", f"whole blocks: {e}") from None
        return format, shape, nbytes, offset

    def padded(self, pos: int) -> int:
        return -(-pos // self.alignment) * self.alignment
