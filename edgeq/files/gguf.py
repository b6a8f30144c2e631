"""GGUF: metadata and tensors of a model in one file, or in several.

A split model is several files named ``-00001-of-0000N.gguf``: the first has the metadata, each has tensors of
its own. Three keys describe the split: ``split.no`` (from 0), ``split.count``, ``split.tensors.count`` (of
all).

`gguf_header` draws the layout of a file and reads it.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from ..tensor import Tensor
from .gguf_header import NUMBERS, Header
from .source import MAX_PARTS, Allowance, all_there, check_size, open_raw, shown

Meta = dict[str, Any]
Tensors = dict[str, Tensor]

PART_NAME = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
SPECIAL_TOKEN = re.compile(r"tokenizer\.ggml\.\w+_token_id")
TYPES = {
    "general.architecture": "str",
    "tokenizer.chat_template": "str",
    "tokenizer.ggml.model": "str",
    "tokenizer.ggml.pre": "str",
    "tokenizer.ggml.tokens": "array of str",
    "tokenizer.ggml.merges": "array of str",
    "tokenizer.ggml.scores": "array of float32",
    "tokenizer.ggml.token_type": "array of int32",
    "tokenizer.ggml.add_bos_token": "bool",
    "tokenizer.ggml.add_eos_token": "bool",
    "tokenizer.ggml.add_space_prefix": "bool",
}


def read(path: str | os.PathLike, *, mmap: bool = True) -> tuple[Meta, Tensors]:
    """Read the header of a GGUF file, and map its tensors.

    Parameters
    ----------
    path : the file; any part of a split model stands for all of it.
    mmap : map the file (the default), or read all of it now: slower, but safe where the file may change.

    Returns
    -------
    meta : GGUF's keys. Numbers, bools and strings as Python's, arrays of strings as lists, other arrays as
        NumPy arrays of the stored type. Keys about a split are left out: its parts are together again.
    tensors : name -> Tensor.

    Raises
    ------
    FormatError : when the file is anything but a sound GGUF file of tensors that edgeq can read.
    """
    meta, tensors, _ = _read(Path(path), mmap)
    return meta, tensors


def read_exact(path: str | os.PathLike) -> tuple[Meta, Tensors]:
    """Like `read`, with each number as a NumPy scalar of the type that the file gives it, for writing it
    again.
    """
    meta, tensors, kinds = _read(Path(path), mmap=True)
    numbers = {key: np.dtype(NUMBERS[kinds[key]]).type for key in meta if kinds[key] in NUMBERS}
    return meta | {key: number(meta[key]) for key, number in numbers.items()}, tensors


def _read(path: Path, mmap: bool) -> tuple[Meta, Tensors, dict[str, int]]:
    """Metadata, tensors, and the type of each key's value."""
    allowance = Allowance()
    meta, tensors, kinds = _read_file(path, allowance, mmap)
    if "split.count" in meta and _whole_number(path, meta, "split.count") > 1:
        meta, tensors, kinds = _gather(path, (meta, tensors, kinds), allowance, mmap)
    meta = {key: value for key, value in meta.items() if not key.startswith("split.")}
    _check_meaning(path, meta)
    return meta, tensors, kinds


def _read_file(path: Path, allowance: Allowance, mmap: bool) -> tuple[Meta, Tensors, dict[str, int]]:
    """Metadata, tensors and types of one file."""
    raw = open_raw(path, allowance, mapped=mmap)
    header = Header(path, raw, allowance)
    n_tensors, n_keys = header.counts()
    meta, tensors = header.metadata(n_keys), header.tensors(n_tensors)
    check_size(path, raw)
    return meta, tensors, header.kinds


def _gather(
    path: Path, read: tuple[Meta, Tensors, dict[str, int]], allowance: Allowance, mmap: bool
) -> tuple[Meta, Tensors, dict[str, int]]:
    """Metadata and types of the first part of a split model and tensors of all parts; `read` is the part
    `path`.
    """
    meta = read[0]
    count, total = meta["split.count"], _whole_number(path, meta, "split.tensors.count")
    gathered: Tensors = {}
    for number, part in enumerate(_part_paths(path, count)):
        part_meta, part_tensors, kinds = read if part == path else _read_file(part, allowance, mmap)
        for key, expected in (("split.no", number), ("split.count", count), ("split.tensors.count", total)):
            found = _whole_number(part, part_meta, key)
            if found != expected:
                raise FormatError(part, f"key {key}", found=f"{found}", expected=f"{expected}")
        for name in part_tensors.keys() & gathered.keys():
            raise FormatError(part, f"tensor {shown(name)}", found="it in two parts", expected="it in one")
        gathered |= part_tensors
        if number == 0:
            first = part_meta, kinds
    if len(gathered) != total:
        raise FormatError(
            path, "", found=f"{len(gathered):,} tensors in {count} parts", expected=f"{total:,}"
        )
    return first[0], gathered, first[1]


def _part_paths(path: Path, count: int) -> list[Path]:
    """Paths of all parts of a split model, from the path of one."""
    name = PART_NAME.fullmatch(path.name)
    if not name or int(name[3]) != count or count > MAX_PARTS:
        raise FormatError(
            path,
            "key split.count",
            found=f"{count:,} in a file of this name",
            expected=f"a name ending in -00001-of-0000N.gguf, N being the count and at most {MAX_PARTS}",
            hint="Give the parts their own names back",
        )
    parts = [path.with_name(f"{name[1]}{i:05}-of-{name[3]}.gguf") for i in range(1, count + 1)]
    return all_there(parts, path.parent, path.resolve().parent)


def _whole_number(path: Path, meta: Meta, key: str) -> int:
    value = meta.get(key)
    if type(value) is not int:
        found = "none" if value is None else _type_name(value)
        raise FormatError(path, f"key {key}", found=found, expected="a whole number")
    return value


def _check_meaning(path: Path, meta: Meta) -> None:
    """FormatError when a key that several rooms rely on has another type or length than it must have."""
    for key in meta.keys() & TYPES.keys():
        found = _type_name(meta[key])
        if found != TYPES[key]:
            raise FormatError(path, f"key {key}", found=found, expected=TYPES[key])
    size = len(meta.get("tokenizer.ggml.tokens", ()))
    for key in meta.keys() & {"tokenizer.ggml.scores", "tokenizer.ggml.token_type"}:
        if len(meta[key]) != size:
            expected = f"{size:,}, one for each token"
            raise FormatError(path, f"key {key}", found=f"{len(meta[key]):,} values", expected=expected)
    for key in filter(SPECIAL_TOKEN.fullmatch, meta):
        token = _whole_number(path, meta, key)
        if size and not 0 <= token < size:
            raise FormatError(path, f"key {key}", found=f"token {token:,}", expected=f"one below {size:,}")


def _type_name(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"array of {value.dtype}"
    return "array of str" if isinstance(value, list) else type(value).__name__
