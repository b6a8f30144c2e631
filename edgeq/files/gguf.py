"""GGUF: metadata and tensors of a model in one file, or in several.

A split model is several files named ``-00001-of-0000N.gguf``: the first has the metadata, each has tensors of
its own, and three keys tell the parts (``split.no`` from 0, ``split.count``, ``split.tensors.count`` of them
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
from .gguf_header import Header
from .source import Allowance, check_size, inside, open_raw, shown

Meta = dict[str, Any]
Tensors = dict[str, Tensor]

MAX_PARTS = 512  # each part holds a file descriptor, and systems give about a thousand
PART_NAME = re.compile(r"(.*-)(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

# Keys that several rooms rely on, and what they must be wherever they stand.
TYPES = {
    "general.architecture": str,
    "tokenizer.chat_template": str,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.ggml.tokens": list,
    "tokenizer.ggml.merges": list,
    "tokenizer.ggml.scores": np.dtype(np.float32),
    "tokenizer.ggml.token_type": np.dtype(np.int32),
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool,
    "tokenizer.ggml.add_space_prefix": bool,
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
        NumPy arrays of the stored type. Keys that describe a split are left out: its parts are together
        again.
    tensors : name -> Tensor.

    Raises
    ------
    FormatError : when the file is anything but a sound GGUF file of tensors that edgeq can read.
    """
    path, allowance = Path(path), Allowance()
    meta, tensors = _read_file(path, allowance, mmap)
    if "split.count" in meta and _whole_number(path, meta, "split.count") > 1:
        meta, tensors = _gather(path, meta, tensors, allowance, mmap)
    meta = {key: value for key, value in meta.items() if not key.startswith("split.")}
    _check_types(path, meta)
    _check_vocabulary(path, meta)
    return meta, tensors


def _read_file(path: Path, allowance: Allowance, mmap: bool) -> tuple[Meta, Tensors]:
    """Metadata and tensors of one file."""
    raw = open_raw(path, allowance, mapped=mmap)
    header = Header(path, raw, allowance)
    n_tensors, n_keys = header.counts()
    meta, tensors = header.metadata(n_keys), header.tensors(n_tensors)
    check_size(path, raw)
    return meta, tensors


def _gather(
    path: Path, meta: Meta, tensors: Tensors, allowance: Allowance, mmap: bool
) -> tuple[Meta, Tensors]:
    """Metadata of the first part of a split model and tensors of all parts; the part `path` has been read."""
    count, total = meta["split.count"], _whole_number(path, meta, "split.tensors.count")
    gathered: Tensors = {}
    first = meta
    for number, part in enumerate(_part_paths(path, count)):
        part_meta, part_tensors = (meta, tensors) if part == path else _read_file(part, allowance, mmap)
        for key, expected in (("split.no", number), ("split.count", count), ("split.tensors.count", total)):
            found = _whole_number(part, part_meta, key)
            if found != expected:
                raise FormatError(part, f"key {key}", found=f"{found}", expected=f"{expected}")
        for name in part_tensors.keys() & gathered.keys():
            raise FormatError(part, f"tensor {shown(name)}", found="it in two parts", expected="it in one")
        gathered |= part_tensors
        first = part_meta if number == 0 else first
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
            found=f"{count:,} in a file of this name",
            expected=f"a name ending in -00001-of-0000N.gguf with N the count, and at most {MAX_PARTS}",
            hint="Give the parts their own names back",
        )
    parts = [path.with_name(f"{name[1]}{i:05}-of-{name[3]}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in parts if not p.exists()]
    if missing:
        found = f"no {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise FormatError(
            path, "", found=found, expected=f"all {count} parts beside it", hint="Fetch the rest"
        )
    return [inside(p, path.parent, path.resolve().parent) for p in parts]


def _whole_number(path: Path, meta: Meta, key: str) -> int:
    value = meta.get(key)
    if type(value) is not int:
        found = "none" if value is None else _type_name(value)
        raise FormatError(path, f"key {key}", found=found, expected="a whole number")
    return value


def _check_types(path: Path, meta: Meta) -> None:
    """FormatError when a well-known key is of another type than its readers expect."""
    for key in meta.keys() & TYPES.keys():
        wanted, value = TYPES[key], meta[key]
        if not (wanted == value.dtype if isinstance(value, np.ndarray) else type(value) is wanted):
            expected = wanted.__name__ if isinstance(wanted, type) else f"array of {wanted}"
            raise FormatError(path, f"key {key}", found=_type_name(value), expected=expected)


def _check_vocabulary(path: Path, meta: Meta) -> None:
    """FormatError unless every token has its score and type, and the special ids are in the vocabulary."""
    size = len(meta.get("tokenizer.ggml.tokens", ()))
    for name in ("scores", "token_type"):
        key = f"tokenizer.ggml.{name}"
        if key in meta and len(meta[key]) != size:
            raise FormatError(
                path, f"key {key}", found=f"{len(meta[key]):,}", expected=f"{size:,}, one a token"
            )
    for key in meta:
        if size and re.fullmatch(r"tokenizer\.ggml\.\w+_token_id", key):
            token = _whole_number(path, meta, key)
            if not 0 <= token < size:
                raise FormatError(path, f"key {key}", found=f"{token:,}", expected=f"an id below {size:,}")


def _type_name(value: Any) -> str:
    return f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
