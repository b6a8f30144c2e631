"""The bytes of a file: mapped into memory, named when they are of another kind, and let go when no longer needed.

A mapped file costs address space, and memory only for the pages that were touched. What readers build from it on the
heap (names, vocabularies, dictionaries) is charged to an Allowance, so that a hostile header cannot ask for more.
"""

import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import FormatError

Raw = mmap.mmap | bytes

# A file announces itself in its first bytes; these are the ones that people pass for a model by mistake.
GET_AGAIN = "The download went wrong: fetch the file again"
SAFER = "A pickle can run any code when it is opened: save the model as safetensors or GGUF"
KINDS = (
    (b"version https://git-lfs", "a git-LFS pointer, not the file it stands for", "Run: git lfs pull"),
    (b"<!doctype html", "an HTML page", GET_AGAIN),
    (b"<html", "an HTML page", GET_AGAIN),
    (b"<?xml", "an XML document", GET_AGAIN),
    (b"gguf", "a GGUF file", ""),
    (b"lmgg", "a GGML file, older than GGUF", "Convert it to GGUF"),
    (b"fmgg", "a GGMF file, older than GGUF", "Convert it to GGUF"),
    (b"tjgg", "a GGJT file, older than GGUF", "Convert it to GGUF"),
    (b"algg", "a GGLA adapter, older than GGUF", "Convert it to GGUF"),
    (b"pk\x03\x04", "a zip archive", "Unpack it first"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first"),
    (b"\xfd7zxz\x00", "an xz archive", "Unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "Unpack it first"),
    (b"\x89hdf", "an HDF5 file", ""),
    (b"\x93numpy", "a NumPy array", ""),
)


class Allowance:
    """Heap memory that the headers of one model may take: the size of its mapped files and 64 MB.

    Charges are upper bounds; 8 MB of the 64 stay back for what is built between two charges.
    """

    def __init__(self) -> None:
        self.left = 56_000_000

    def spend(self, path: object, where: str, nbytes: int) -> None:
        """Charge `nbytes`; FormatError once everything is spent."""
        self.left -= nbytes
        if self.left < 0:
            raise FormatError(
                path,
                where,
                found="a header that needs more memory than the file's size and 64 MB",
                expected="a header in proportion to the file",
            )


def open_raw(path: str | os.PathLike, allowance: Allowance, *, mapped: bool = True) -> Raw:
    """The bytes of a regular file, mapped (or read), and their size added to the allowance when it was mapped."""
    # Opening a pipe or a device could wait forever, so the kind is looked at first.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FormatError(path, "", found="a folder, pipe or device", expected="a file")
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size == 0:
            raise FormatError(path, "", found="an empty file", expected="a model", hint=GET_AGAIN)
        if not mapped:
            return f.read()
        allowance.left += size
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def check_size(path: str | os.PathLike, raw: Raw) -> None:
    """FormatError when a file no longer has the size it was opened with: touching its lost pages would kill us."""
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
    """The error for a file that is not what its name promised, saying what it is as well as its bytes can tell."""
    found, hint = recognize(raw[:512], len(raw))
    return FormatError(path, "", found=found, expected=expected, hint=hint)


def recognize(head: bytes, size: int) -> tuple[str, str]:
    """(what a file is, what to do about it) from its first bytes and its size."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[:2] == b"PK" and b".pkl" in head:
        return "a PyTorch checkpoint (a zip of pickles)", SAFER
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle", SAFER
    for magic, name, hint in KINDS:
        if head.lower().startswith(magic) or (magic.isascii() and text.lower().startswith(magic)):
            return name, hint
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "a safetensors file", "Give the folder that holds it and its config.json"
    if not head.strip(b"\0"):
        return "zeros", GET_AGAIN
    if text.startswith((b"{", b"[")):
        return f"JSON, {shown(text[:40])}", ""
    if (
        head.isascii()
        and head.decode().replace("\n", " ").replace("\t", " ").replace("\r", " ").isprintable()
    ):
        return f"text, {shown(text[:40])}", ""
    return f"unknown bytes {head[:8].hex(' ')}", ""


def shown(text: str | bytes) -> str:
    """A name from a file, fit for a message: printable, and not longer than a line."""
    if isinstance(text, bytes):
        return ascii(text.decode("utf-8", "replace"))
    if len(text) <= 80 and text.isprintable():
        return text
    return ascii(text[:80]) + ("..." if len(text) > 80 else "")


def inside(path: Path, roots: Iterable[Path]) -> Path:
    """The path itself when it is a file that lies, symbolic links followed, in one of the folders `roots`.

    The Hugging Face cache keeps files as links from models--NAME/snapshots/REVISION into models--NAME/blobs, so a
    root in such a folder stands for the whole of it.
    """
    real = path.resolve()
    for root in roots:
        root = root.resolve()
        if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
            root = root.parent.parent
        if real.is_relative_to(root):
            return path
    raise FormatError(
        path,
        "",
        found=f"a link to {real}",
        expected="a file in the model's own folder",
        hint="Copy the file into the folder",
    )


def release(array: np.ndarray) -> None:
    """Let the system take back the memory pages of a mapped array, to be read again from the file if touched.

    Called once weights are repacked, so that a model is not held twice. Whole pages inside the array only; nothing
    happens to an array that is not mapped, or where the system has no such advice.
    """
    base = array
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
