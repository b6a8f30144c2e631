"""The curve of losses as a PNG: each step's, their running mean, and the loss at some heights.

A PNG is a signature and chunks: length, name, data, CRC-32 of name and data. The pixels here are indices into
PALETTE, a byte each, and each row begins with a byte for its filter, 0 for none.
"""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..evaluate.chart import Axis, axis, number
from ..files.output import whole

WIDTH, HEIGHT, LEFT, EDGE = 640, 360, 64, 24
PAPER, GRID, INK, PALE, LINE = range(5)
PALETTE = bytes.fromhex("fdfdfb e6e8ea 5c6670 a9c8e6 1f6fb4")
SPAN = 20  # steps that a mean looks back on, nearly all of its weight
# columns of five pixels, the lowest bit on top
GLYPHS = {
    "0": (31, 17, 31), "1": (18, 31, 16), "2": (29, 21, 23), "3": (21, 21, 31), "4": (7, 4, 31),
    "5": (23, 21, 29), "6": (31, 21, 29), "7": (1, 1, 31), "8": (31, 21, 31), "9": (23, 21, 31),
    ".": (0, 16, 0), ",": (16, 24, 0), "-": (4, 4, 4), "e": (14, 21, 22), "+": (4, 14, 4),
}  # fmt: skip


def write(path: Path, losses: Sequence[float]) -> None:
    """Draw the losses of some steps."""
    data = png(draw(losses))
    with whole(path, nbytes=len(data)) as (new,):
        new.write_bytes(data)


def draw(losses: Sequence[float]) -> np.ndarray:
    """Pixels uint8 (HEIGHT, WIDTH) of losses."""
    pixels = np.full((HEIGHT, WIDTH), PAPER, np.uint8)
    y, x = axis("", losses), Axis("", 0, max(len(losses) - 1, 1))
    for value, label in y.ticks():
        row = _row(y, value)
        pixels[row, LEFT : WIDTH - EDGE] = GRID
        _write(pixels, row - 5, LEFT - 8 - 8 * len(label), label)
    _write(pixels, HEIGHT - EDGE + 8, WIDTH - EDGE - 8 * len(number(len(losses))), number(len(losses)))
    mean = losses[0]
    means: list[float] = []
    for loss in losses:
        mean += (loss - mean) / min(len(means) + 1, SPAN)
        means.append(mean)
    columns = [LEFT + round((WIDTH - LEFT - EDGE - 1) * x.share(i)) for i in range(len(losses))]
    for values, color in ((losses, PALE), (means, LINE)):
        rows = [_row(y, v) for v in values]
        every = np.arange(columns[0], columns[-1] + 1)
        heights = np.rint(np.interp(every, columns, rows)).astype(int)
        for column, row, before in zip(every, heights, [heights[0], *heights[:-1]], strict=True):
            pixels[min(row, before) : max(row, before) + 2, column] = color
    return pixels


def _row(y: Axis, value: float) -> int:
    """The row of pixels of a loss."""
    return EDGE + round((HEIGHT - 2 * EDGE) * (1 - y.share(value)))


def _write(pixels: np.ndarray, top: int, left: int, text: str) -> None:
    """Letters of 6 by 10 pixels, 8 from one to the next."""
    for i, letter in enumerate(text):
        bits = np.array(GLYPHS[letter])[None, :] >> np.arange(5)[:, None] & 1
        there = bits.repeat(2, axis=0).repeat(2, axis=1).astype(bool)
        pixels[top : top + 10, left + 8 * i : left + 8 * i + 6][there] = INK


def png(pixels: np.ndarray) -> bytes:
    """The file of pixels uint8 (height, width)."""
    height, width = pixels.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # of a byte each, with a palette
    rows = np.pad(pixels, ((0, 0), (1, 0))).tobytes()
    chunks = ((b"IHDR", header), (b"PLTE", PALETTE), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)
