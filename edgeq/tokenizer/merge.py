"""Byte-pair encoding: the pair of neighbors that comes first is joined, the leftmost among equals, until no
pair is left that could be.

    "hello"  →  h e l l o  →  he l l o  →  he ll o  →  hell o

Words repeat, so what a short one became is remembered.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from heapq import heapify, heappop, heappush

MEMO, MEMO_CHARS = 1 << 15, 32

Order = Callable[[str, int, int, int], float | None]


def encoder(order: Order, ids: Callable[[str], Iterable[int]]) -> Callable[[str], tuple[int, ...]]:
    """A function word -> ids.

    ``order(word, i, j, k)`` says when the symbols ``word[i:j]`` and ``word[j:k]`` are joined, least first, or
    None if never; ``ids(symbol)`` is what is left of a symbol in the end.
    """

    def encode(word: str) -> tuple[int, ...]:
        return tuple(id for symbol in merged(word, order) for id in ids(symbol))

    remembered = lru_cache(MEMO)(encode)
    return lambda word: remembered(word) if len(word) <= MEMO_CHARS else encode(word)


def merged(word: str, order: Order) -> list[str]:
    """The symbols that the characters of a word are joined to."""
    size = len(word)
    # A symbol is known by where it starts; end is 0 where the right part of a union started.
    end = [*range(1, size + 1), 0]
    left = [*range(-1, size)]

    def union(i: int, j: int) -> tuple[float, int, int, int] | None:
        """Queue entry for joining the symbols at i and j."""
        when = order(word, i, j, end[j])
        return None if when is None else (when, i, j, end[j])

    queue = [entry for i in range(size - 1) if (entry := union(i, i + 1))]
    heapify(queue)
    while queue:
        _, i, j, k = heappop(queue)
        if end[i] != j or end[j] != k:  # one of the two has been joined with another since
            continue
        end[i], end[j], left[k] = k, 0, i
        if i > 0 and (entry := union(left[i], i)):
            heappush(queue, entry)
        if k < size and (entry := union(i, k)):
            heappush(queue, entry)

    symbols, i = [], 0
    while i < size:
        symbols.append(word[i : end[i]])
        i = end[i]
    return symbols
