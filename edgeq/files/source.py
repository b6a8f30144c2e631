"""The bytes of a file: mapped into memory, named when they are of another kind, let go when no longer needed.

A mapped file costs address space, and memory only for the pages that were touched. What readers build from it
on the heap (names, vocabularies, dictionaries) is charged to an Allowance, so that a hostile header cannot
ask for more than its file's size can justify.
"""

import mmap
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError

Raw = mmap.mmap | bytes

AGAIN = "The download may be incomplete or damaged: fetch the file again"
SAFER = "A pickle can run any code when it is opened: save the model as safetensors or GGUF"

# What people pass for a model by mistake: the first bytes of binary files, and the first words of texts.
MAGICS = (
    (b"GGUF", "a GGUF file", ""),
    (b"lmgg", "a GGML file, older than GGUF", "Convert the model again"),
    (b"fmgg", "a GGMF file, older than GGUF", "Convert the model again"),
    (b"tjgg", "a GGJT file, older than GGUF", "Convert the model again"),
    (b"algg", "a GGLA adapter, older than GGUF", "Convert the model again"),
    (b"PK\x03\x04", "a zip archive", "Unpack it first"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first"),
    (b"\xfd7zXZ\0", "an xz archive", "Unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "Unpack it first"),
    (b"\x89HDF", "an HDF5 file", ""),
    (b"\x93NUMPY", "a NumPy array", ""),
)
WORDS = (
    (b"version https://git-lfs", "a git-LFS pointer, not the file it stands for", "Run: git lfs pull"),
    (b"<!doctype html", "an HTML page", AGAIN),
    (b"<html", "an HTML page", AGAIN),
    (b"<?xml", "an XML document", AGAIN),
)

MAX_PARTS = 512  # files of one model; each mapping holds a descriptor, and systems give about a thousand
SPARE = (
    56_000_000  # bytes; a header may cost its file's size and 64 MB, of which 8 are for work between charges
)


class Allowance:
    """Heap memory that the headers of one model may take. Charges are upper bounds."""

    def __init__(self) -> None:
        self.left = SPARE

    def spend(self, path: object, where: str, nbytes: int) -> None:
        """Charge `nbytes`; FormatError once everything is spent."""
        self.left -= nbytes
        if self.left < 0:
            raise FormatError(
                path,
                where,
                found="a header that needs more memory than the file's size and 64 MB",
                expected="one in proportion to the file",
            )


def open_raw(path: str | os.PathLike, allowance: Allowance, *, mapped: bool = True) -> Raw:
    """The bytes of a regular file: mapped, which adds its size to the allowance, or read."""
    # The kind is looked at before opening, because opening a pipe waits for somebody to write into it.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FormatError(path, "", found="a folder, pipe or device", expected="a file")
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size == 0:
            raise FormatError(path, "", found="an empty file", expected="a model", hint=AGAIN)
        if not mapped:
            return f.read()
        allowance.left += size
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def check_size(path: str | os.PathLike, raw: Raw) -> None:
    """FormatError when a file changed its size since it was opened: touching lost pages kills the process."""
    size = os.stat(path).st_size
    if size != len(raw):
        raise FormatError(
            path,
            "",
            found=f"{size:,} bytes now",
            expected=f"the {len(raw):,} bytes it had when it was opened",
            hint="Something else is writing this file",
        )


def foreign(path: object, raw: Raw, expected: str) -> FormatError:
    """The error for a file that is not what it was taken for; says what it is, if its first bytes tell."""
    found, hint = recognize(raw[:512], len(raw))
    return FormatError(path, "", found=found, expected=expected, hint=hint)


def recognize(head: bytes, size: int) -> tuple[str, str]:
    """What a file is, and what to do about it, from its first bytes and its size."""
    if head.startswith(b"PK") and b".pkl" in head:
        return "a PyTorch checkpoint, which is a zip of pickles", SAFER
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle", SAFER
    for magic, name, hint in MAGICS:
        if head.startswith(magic):
            return name, hint
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for words, name, hint in WORDS:
        if text.lower().startswith(words):
            return name, hint
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "a safetensors file", "Give the folder that holds it and its config.json"
    if not head.strip(b"\0"):
        return "zeros", AGAIN
    line = " ".join(text[:60].decode("latin-1").split())
    if line and text.isascii() and line.isprintable():
        return f"{'JSON' if line[0] in '{[' else 'text'}, {line}", ""
    return f"unknown bytes, {head[:8].hex(' ')}", ""


def shown(name: str) -> str:
    """A name from a file, fit for a message: printable, and no longer than a line."""
    if len(name) <= 80 and name.isprintable():
        return name
    return ascii(name[:80]) + ("..." if len(name) > 80 else "")


def brief(value: Any) -> str:
    """A value from a file as Python writes it, fit for a message."""
    return shown(reprlib.repr(value))


def all_there(parts: list[Path], *folders: Path) -> list[Path]:
    """The paths themselves, when they are files of the folders, none of them is missing, and not too many."""
    folder = folders[0]
    if len(parts) > MAX_PARTS:
        raise FormatError(folder, "", found=f"{len(parts):,} parts", expected=f"at most {MAX_PARTS}")
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        found = f"no {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        expected = f"all {len(parts)} parts of the model"
        raise FormatError(folder, "", found=found, expected=expected, hint="Fetch the rest")
    return [inside(part, *folders) for part in parts]


def inside(path: Path, *folders: Path) -> Path:
    """The path itself, when the file it leads to lies in one of the folders.

    The Hugging Face cache keeps files as links from models--NAME/snapshots/REVISION into models--NAME/blobs:
    such a folder stands for the whole of models--NAME.
    """
    real = path.resolve()
    for folder in folders:
        root = folder.resolve()
        if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
            root = root.parent.parent
        if real.is_relative_to(root):
            return path
    raise FormatError(
        path,
        "",
        found=f"a link to {shown(str(real))}",
        expected="a file in the folder of the model",
        hint="Copy the file into the folder",
    )


def release(array: np.ndarray) -> None:
    """Let the system take back the memory of a mapped array; its pages are read again if they are touched.

    Called once weights are repacked, so that a model is not held twice. Only whole pages inside the array are
    let go, and nothing happens to an array that is not mapped, or on a system without such advice.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    origin = np.frombuffer(base, np.uint8).ctypes.data
    low, high = (address - origin for address in np.lib.array_utils.byte_bounds(array))
    low, high = -(-low // mmap.PAGESIZE) * mmap.PAGESIZE, high // mmap.PAGESIZE * mmap.PAGESIZE
    if low < high:
        base.madvise(mmap.MADV_DONTNEED, low, high - low)
