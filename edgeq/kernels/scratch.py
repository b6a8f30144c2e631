"""Scratch: arrays for results, whose memory is used again as soon as nobody holds the last one.

The C library gives large blocks back to the system when they are freed, and the system clears them before it
gives them out again: of a prompt's time that took a third.
"""

import ctypes
import sys
from math import prod

import numpy as np

SMALL = 1 << 16  # bytes below which the C library does the same
MOST = 1 << 26  # bytes that are kept while nobody uses them
MMAP_THRESHOLD = -3  # glibc's number for it, in malloc.h
LINE = 64  # bytes of a cache line, where arrays begin
blocks: list[np.ndarray] = []


def _holders(i: int) -> int:
    """References to a block: the list's, this call's, and one of each array that lies in it."""
    return sys.getrefcount(blocks[i])


blocks.append(np.empty(0, np.uint8))
NOBODY = _holders(0)
blocks.clear()


def _idle() -> list[int]:
    """The blocks that no array lies in."""
    return [i for i in range(len(blocks)) if _holders(i) == NOBODY]


def keep_nothing_else() -> None:
    """Let the C library give each block of a megabyte back when it is freed, for the rest of the process.

    glibc learns from the blocks that it sees to keep them, up to 32 MB, and in long work whose blocks differ
    in size half of the memory is such holes. Other libraries do not.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(MMAP_THRESHOLD, 1 << 20)


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array with arbitrary contents; callers take turns."""
    size = 4 * prod(shape)
    if size < SMALL:
        return np.empty(shape, np.float32)
    idle = _idle()
    fitting = [i for i in idle if size + LINE <= blocks[i].nbytes <= 2 * size]
    if fitting:
        best = min(fitting, key=lambda i: blocks[i].nbytes)
    else:
        if sum(blocks[i].nbytes for i in idle) > MOST:
            blocks[:] = [blocks[i] for i in range(len(blocks)) if i not in idle]
        best = len(blocks)
        blocks.append(np.empty(size + LINE, np.uint8))
    start = -blocks[best].ctypes.data % LINE
    return blocks[best][start : start + size].view(np.float32).reshape(shape)
