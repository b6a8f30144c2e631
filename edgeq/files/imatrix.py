"""Importance matrices of llama.cpp: how much each input of a matrix matters, measured on text.

    importance[j] = mean of x[j]², over the tokens that the matrix was multiplied with

A GGUF file holds, for each weight NAME, the sums and how many tokens were summed; of experts, one of a stack:

    NAME.in_sum2   f32 (matrices, cols)            imatrix.datasets      names of the texts
    NAME.counts    f32 (matrices, 1)               imatrix.chunk_count, imatrix.chunk_size

An older .dat file:

    i32  entries
    entries x  { i32 length; char name[length]; i32 calls; i32 n; f32 mean x calls [n] }
    i32  chunks;  i32 length;  char dataset[length]          may be missing

Source: imatrix-loader.cpp of llama.cpp.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .. import formats
from ..errors import FormatError
from . import gguf
from .source import Allowance, brief, open_raw, shown

SUMS, COUNTS = ".in_sum2", ".counts"


class Imatrix(NamedTuple):
    """Contents of a file.

    Attributes
    ----------
    path : the file.
    importance : name of a weight -> float32 (matrices * cols,).
    datasets : names of the texts.
    chunks : pieces of text that were measured, 0 where the file does not say.
    """

    path: Path
    importance: dict[str, np.ndarray]
    datasets: list[str]
    chunks: int


def read(path: str | os.PathLike) -> Imatrix:
    """Read an importance matrix; FormatError when it is not sound, or holds what is no finite number >= 0."""
    path = Path(path)
    with open(path, "rb") as f:
        magic = f.read(4)
    made = _from_gguf(path) if magic == b"GGUF" else _from_dat(path)
    if not made.importance:
        raise FormatError(path, "", found="no entries", expected="an importance matrix")
    for name, values in made.importance.items():
        if not (np.isfinite(values) & (values >= 0)).all():
            expected = "finite numbers from 0"
            raise FormatError(path, f"entry {shown(name)}", found="others", expected=expected)
    return made


def _from_gguf(path: Path) -> Imatrix:
    meta, tensors = gguf.read(path)
    importance = {}
    for name in [n.removesuffix(SUMS) for n in tensors if n.endswith(SUMS)]:
        sums, counts = tensors[name + SUMS], tensors.get(name + COUNTS)
        if counts is None or sums.format != "f32" or counts.format != "f32" or sums.rows != counts.rows:
            expected = f"{shown(name + COUNTS)} with a number for each of its rows, both in f32"
            raise FormatError(path, f"tensor {shown(name + SUMS)}", found="no such pair", expected=expected)
        total, count = formats.dequantize(sums), formats.dequantize(counts)
        # an expert that saw no text is as important as any
        importance[name] = np.divide(total, count, out=np.ones_like(total), where=count > 0).reshape(-1)
    datasets, chunks = meta.get("imatrix.datasets", []), meta.get("imatrix.chunk_count", 0)
    if not isinstance(datasets, list) or type(chunks) is not int:
        found = f"{brief(datasets)} and {brief(chunks)}"
        expected = "an array of strings and a whole number"
        raise FormatError(path, "imatrix.datasets, imatrix.chunk_count", found=found, expected=expected)
    return Imatrix(path, importance, datasets, chunks)


def _from_dat(path: Path) -> Imatrix:
    raw, at = open_raw(path, Allowance()), 0

    def fail(where: str, found: Any, expected: str) -> NoReturn:
        raise FormatError(path, where, found=f"{found}", expected=expected)

    def take(nbytes: int) -> bytes:
        nonlocal at
        if not 0 <= nbytes <= len(raw) - at:
            expected = f"at most the {len(raw) - at:,} left in the file"
            fail(f"byte {at:,}", f"a length of {nbytes:,} bytes", expected)
        at += nbytes
        return raw[at - nbytes : at]

    def number() -> int:
        return int.from_bytes(take(4), "little", signed=True)

    importance: dict[str, np.ndarray] = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls, n = number(), number()
        if calls < 0 or name in importance:
            fail(f"entry {shown(name)}", "it twice" if name in importance else f"{calls} calls", "each once")
        importance[name] = np.frombuffer(take(4 * n), "<f4") / np.float32(max(calls, 1))
    chunks, datasets = 0, []
    if at < len(raw):
        chunks = number()
        datasets = [take(number()).decode("utf-8", "replace")]
    return Imatrix(path, importance, datasets, chunks)
