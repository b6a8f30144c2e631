"""Importance matrices of llama.cpp: how much each input of a matrix matters, measured on text.

    importance[j] = mean of x[j]², over the tokens that the matrix was multiplied with

A GGUF file holds, for each weight NAME, the sums and how many tokens were summed; of experts, one of a stack:

    NAME.in_sum2   f32 (matrices, cols)            imatrix.datasets      names of the texts
    NAME.counts    f32 (matrices, 1)               imatrix.chunk_count, imatrix.chunk_size

An older .dat file:

    i32  entries
    entries x  { i32 length; char name[length]; i32 calls; i32 n; f32 mean x calls [n] }
    i32  chunks;  i32 length;  char dataset[length]          may be missing

A call is a chunk of text; how many tokens that has, the file does not say.

Source: imatrix-loader.cpp and imatrix.cpp of llama.cpp.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .. import formats
from ..errors import FormatError
from . import gguf, gguf_writer
from .output import Entry, durable, whole
from .source import Allowance, brief, open_raw, shown

SUMS, COUNTS = ".in_sum2", ".counts"
CHUNK = 512  # tokens of a chunk, where a file does not say


class Squares(NamedTuple):
    """What was measured for a weight.

    Attributes
    ----------
    sums : Σ x², float64 (matrices, cols).
    counts : how many tokens were summed, float64 (matrices, 1).
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Mean of x², float64 (matrices, cols); an expert that saw no text is as important as any: 1."""
        return np.divide(self.sums, self.counts, out=np.ones_like(self.sums), where=self.counts > 0)


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix.

    Attributes
    ----------
    squares : by name of the weight.
    datasets : names of the texts.
    chunks : pieces of text that were measured, 0 where a file does not say.
    chunk_size : tokens of each.
    path : the file that was read, if it was one.
    """

    squares: Mapping[str, Squares]
    datasets: list[str]
    chunks: int
    chunk_size: int = CHUNK
    path: Path | None = None

    @cached_property
    def importance(self) -> dict[str, np.ndarray]:
        """Name of a weight -> float32 (matrices * cols,)."""
        return {name: s.mean.astype(np.float32).reshape(-1) for name, s in self.squares.items()}


def read(path: str | os.PathLike) -> Imatrix:
    """Read an importance matrix; FormatError when it is not sound, or holds what is no finite number >= 0."""
    path = Path(path)
    with open(path, "rb") as f:
        magic = f.read(4)
    made = _from_gguf(path) if magic == b"GGUF" else _from_dat(path)
    if not made.squares:
        raise FormatError(path, "", found="no entries", expected="an importance matrix")
    for name, squares in made.squares.items():
        if not all((np.isfinite(values) & (values >= 0)).all() for values in squares):
            expected = "finite numbers from 0"
            raise FormatError(path, f"entry {shown(name)}", found="others", expected=expected)
    return made


def merge(parts: Iterable[Imatrix]) -> Imatrix:
    """What all of them measured together; ValueError where they are of different models."""
    first, *others = parts
    squares, chunks = dict(first.squares), first.chunks
    for other in others:
        for name, (sums, counts) in other.squares.items():
            before = squares.get(name, Squares(np.zeros_like(sums), np.zeros_like(counts)))
            if before.sums.shape != sums.shape:
                raise ValueError(
                    f"entry {shown(name)} has {sums.shape[1]:,} columns in {other.path}, in others "
                    f"{before.sums.shape[1]:,}: these are of different models"
                )
            squares[name] = Squares(before.sums + sums, before.counts + counts)
        chunks += other.chunks
    datasets = dict.fromkeys(name for part in (first, *others) for name in part.datasets)
    return Imatrix(squares, [*datasets], chunks, first.chunk_size)


def write(path: str | os.PathLike, imatrix: Imatrix) -> None:
    """Write an importance matrix as llama-imatrix does: the older form where the name ends in .dat, else
    GGUF. The file appears whole or not at all.
    """
    path = Path(path)
    if path.suffix == ".dat":
        _to_dat(path, imatrix)
    else:
        _to_gguf(path, imatrix)


def _from_gguf(path: Path) -> Imatrix:
    meta, tensors = gguf.read(path)
    squares = {}
    for name in [n.removesuffix(SUMS) for n in tensors if n.endswith(SUMS)]:
        sums, counts = tensors[name + SUMS], tensors.get(name + COUNTS)
        pair = counts is not None and sums.format == counts.format == "f32"
        if counts is None or not pair or (counts.rows, counts.cols) != (sums.rows, 1):
            expected = f"{shown(name + COUNTS)} with a number for each of its rows, both in f32"
            raise FormatError(path, f"tensor {shown(name + SUMS)}", found="no such pair", expected=expected)
        squares[name] = Squares(*(formats.dequantize(t).astype(np.float64) for t in (sums, counts)))
    datasets = meta.get("imatrix.datasets", [])
    chunks, size = meta.get("imatrix.chunk_count", 0), meta.get("imatrix.chunk_size", CHUNK)
    if not isinstance(datasets, list) or type(chunks) is not int or type(size) is not int or size < 1:
        found = ", ".join(map(brief, (datasets, chunks, size)))
        where = "imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size"
        raise FormatError(path, where, found=found, expected="an array of strings and two whole numbers")
    return Imatrix(squares, datasets, chunks, size, path)


def _to_gguf(path: Path, imatrix: Imatrix) -> None:
    meta = {
        "general.type": "imatrix",
        "imatrix.datasets": imatrix.datasets,
        "imatrix.chunk_count": imatrix.chunks,
        "imatrix.chunk_size": imatrix.chunk_size,
    }
    entries = []
    for name, squares in sorted(imatrix.squares.items()):
        for suffix, values in zip((SUMS, COUNTS), squares, strict=True):
            data = values.astype("<f4").view(np.uint8).reshape(-1)
            shape = values.shape if len(values) > 1 else values.shape[1:]  # as ggml counts dimensions
            number = formats.get("f32").GGML
            entries.append(Entry(name + suffix, number, shape, data.nbytes, partial(iter, [data])))
    gguf_writer.write(path, meta, entries)


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

    squares: dict[str, Squares] = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls, n = number(), number()
        if calls < 0 or name in squares:
            fail(f"entry {shown(name)}", "it twice" if name in squares else f"{calls} calls", "each once")
        sums = np.frombuffer(take(4 * n), "<f4").astype(np.float64).reshape(1, -1)
        squares[name] = Squares(sums * CHUNK, np.full((1, 1), max(calls, 1) * CHUNK, np.float64))
    chunks, datasets = 0, []
    if at < len(raw):
        chunks = number()
        datasets = [take(number()).decode("utf-8", "replace")]
    return Imatrix(squares, datasets, chunks, CHUNK, path)


def _to_dat(path: Path, imatrix: Imatrix) -> None:
    integer, size = struct.Struct("<i").pack, imatrix.chunk_size
    measured = {name: s for name, s in sorted(imatrix.squares.items()) if s.counts.any()}
    out = [integer(len(measured))]
    for name, squares in measured.items():
        calls = -(-int(squares.counts.max()) // size)
        values = (squares.mean * calls).astype("<f4")
        out += integer(len(name.encode())), name.encode(), integer(calls), integer(values.size)
        out.append(values.tobytes())
    dataset = "".join(imatrix.datasets[-1:]).encode()
    out += integer(imatrix.chunks), integer(len(dataset)), dataset
    data = b"".join(out)
    with whole(path, nbytes=len(data)) as (unfinished,), durable(unfinished) as f:
        f.write(data)
