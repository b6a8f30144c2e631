"""Wiring: from which bit of the file each bit of a record comes.

Most formats keep their codes, scales and offsets as they are, each format in an order of its own. Then every
bit of a record is a bit of the file, as it is or inverted, or it is always the same. Which bit it is need not
be written down for each format and record: blocks whose bits tell their own numbers go through
`lanes.prepare`, and are read off where they come out. Only formats that compute (digits of base three, powers
of two) have no wiring.

A kernel moves the bits in words: four codes of a plane, or a number, of each of sixteen rows.

    words     place in the records, size in bytes, constant, first piece, piece after the last
    pieces    place in the row, shift to the right, shift to the left, mask

    word = constant ^ piece ^ piece ...
    piece = (four bytes of the row, little-endian) >> right << left & mask
"""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .lanes import PLANE_BYTES, ROWS


class Wiring(NamedTuple):
    """How bytes of a row become its share of records.

    Attributes
    ----------
    source, target : bytes of a row, and of the records, that the wiring describes; both repeat.
    words : int64 (n, 5), as drawn above.
    pieces : int64 (m, 4).
    """

    source: int
    target: int
    words: np.ndarray
    pieces: np.ndarray


def find(convert: Callable[[np.ndarray], np.ndarray], source: int, record: np.dtype) -> Wiring | None:
    """The wiring that does what a function does: rows uint8 (n, source) -> records (n / 16, some); None when
    there is none.
    """
    number = np.arange(8 * source)
    patterns = [number < 0, number >= 0, *(number >> i & 1 == 1 for i in range((8 * source).bit_length()))]
    asked = np.packbits(patterns, axis=1, bitorder="little").repeat(ROWS, axis=0)
    told = convert(asked)
    records = told.shape[1]
    told = np.ascontiguousarray(told).view(np.uint8)
    constant = told[0]
    flips, *numbers = np.unpackbits(told[1:] ^ constant, axis=1, bitorder="little").astype(np.int64)
    origin = np.where(flips, sum(bits << i for i, bits in enumerate(numbers)), -1)
    words, pieces = [], []
    for place, size in _places(record, records):
        masks: dict[int, int] = defaultdict(int)
        for bit, start in enumerate(origin[8 * place : 8 * (place + size)].tolist()):
            if start >= 0:
                masks[start - bit] |= 1 << bit
        first = len(pieces)
        for move, mask in masks.items():
            lowest = (mask & -mask).bit_length() - 1
            at = min((lowest + move) // 8, source - 4)
            shift = move - 8 * at
            if at < 0 or mask.bit_length() + shift > 32:
                return None
            pieces.append((at, max(shift, 0), max(-shift, 0), mask))
        pieces[first:] = sorted(pieces[first:])
        value = int.from_bytes(constant[place : place + size].tobytes(), "little")
        words.append((place, size, value, first, len(pieces)))
    return Wiring(source, told.shape[1], np.array(words, np.int64), np.array(pieces, np.int64))


def _places(record: np.dtype, records: int) -> list[tuple[int, int]]:
    """(byte, size) of each word of the first of sixteen rows, in some records."""
    places = []
    for name, (kind, at) in record.fields.items():
        size = 4 if name in PLANE_BYTES else kind.base.itemsize
        places += [(at + i, size) for i in range(0, kind.itemsize, ROWS * size)]
    return [(i * record.itemsize + at, size) for i in range(records) for at, size in places]
