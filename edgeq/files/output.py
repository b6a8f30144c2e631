"""What writers share. Output appears whole or not at all: it is written under another name beside its own,
and renamed when it is done.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..errors import EdgeqError
from .source import MAX_PARTS, shown

Progress = Callable[[str, int, int], None]

SPARE = 16 << 20  # bytes that stay free on the disk


class Entry(NamedTuple):
    """A tensor that will be written.

    Attributes
    ----------
    name : as the container has it.
    type : the container's word for the type: GGUF's number, or a dtype of safetensors.
    shape : in NumPy order.
    nbytes : of all pieces.
    pieces : called when its turn comes; gives its bytes, arrays of uint8 one after the other.
    """

    name: str
    type: int | str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[np.ndarray]]


@contextmanager
def whole(*paths: Path, nbytes: int) -> Iterator[list[Path]]:
    """New names for files or folders, which become `paths` when the block ends, and are removed when it
    fails.

    Parameters
    ----------
    paths : where the output belongs, all in one folder; files of these names are replaced.
    nbytes : what the output will take; EdgeqError when the disk has no room for it.
    """
    folder = paths[0].parent
    if not folder.is_dir():
        raise EdgeqError(f"{folder} is no folder: {paths[0].name} would be written there")
    free = shutil.disk_usage(folder).free
    if nbytes + SPARE > free:
        raise EdgeqError(
            f"{folder} has {free >> 20:,} MiB free, {nbytes + SPARE >> 20:,} MiB are needed. "
            "Make room, or write to another disk"
        )
    for path in paths:
        if path.is_dir() and any(path.iterdir()):
            raise EdgeqError(f"{path} is a folder that is not empty. Name a new one")
    mark = secrets.token_hex(4)
    unfinished = [path.with_name(f".{path.name}.{mark}.part") for path in paths]
    try:
        yield unfinished
        for new, path in zip(unfinished, paths, strict=True):
            os.replace(new, path)
    finally:  # also of an interrupt; what has its own name by now is not found
        for new in unfinished:
            if new.is_dir():
                shutil.rmtree(new)
            else:
                new.unlink(missing_ok=True)


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """A new file, on the disk when the block ends: its name must not survive a power cut that its bytes do
    not.
    """
    with open(path, "xb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())


def write_tensors(
    f: BinaryIO, entries: Iterable[Entry], report: Callable[[int], None], alignment: int = 1
) -> None:
    """Append tensors, each filled up to a multiple of the alignment; `report` hears of the bytes."""
    for entry in entries:
        written = 0
        for piece in entry.pieces():
            f.write(piece.data)
            written += piece.nbytes
            report(piece.nbytes)
        assert written == entry.nbytes, entry.name
        f.write(bytes(-written % alignment))


def reporter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that counts bytes and passes on how far the writing has come."""
    done = 0

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress("writing", done, total)

    return report


def parts(entries: Sequence[Entry], max_size: int | None, alignment: int = 1) -> list[list[Entry]]:
    """The tensors of each file: as many as fit into `max_size` bytes, all where that is None."""
    made: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        nbytes = entry.nbytes + -entry.nbytes % alignment
        if max_size is not None and nbytes > max_size:
            raise EdgeqError(
                f"parts of {max_size:,} bytes are too small: tensor {shown(entry.name)} alone has {nbytes:,}"
            )
        if max_size is not None and size + nbytes > max_size:
            made.append([])
            size = 0
        made[-1].append(entry)
        size += nbytes
    if len(made) > MAX_PARTS:
        raise EdgeqError(f"parts of {max_size:,} bytes would be {len(made):,}, of at most {MAX_PARTS}")
    return made
