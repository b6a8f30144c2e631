"""SentencePiece's byte-pair encoding: the neighbors whose union has the best score are joined, the leftmost
among equals, until no union is a token.

    "▁Hello"  →  ▁ H e l l o  →  ▁ H el l o  →  ▁ Hel lo  →  ▁Hello

The tokenizers library merges by the rank of a pair; here it is by the score of the result, and pairs that
make the same token are equals. The two differ on runs of one character, hence these few lines. They are fast
because words repeat: text is cut where no token reaches across, and what a piece became is remembered.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush

SPACE = "▁"  # U+2581 stands for a space
MEMO, MEMO_CHARS = 1 << 15, 32


def encoder(
    ids: Mapping[str, int], scores: Sequence[float], unknown: Callable[[str], list[int]]
) -> Callable[[str], list[int]]:
    """A function text -> ids, by the score of each id; `unknown` is for a character that is no token."""

    def merge(piece: str) -> tuple[int, ...]:
        """Ids of one piece of text in which spaces are ▁."""
        size = len(piece)
        # A symbol is known by where it starts; end is 0 where the right part of a union started.
        end = [*range(1, size + 1), 0]
        left = [*range(-1, size)]

        def union(i: int, j: int) -> tuple[float, int, int, int] | None:
            """Queue entry for joining the symbols at i and j, or None when that is no token."""
            token = ids.get(piece[i : end[j]])
            return None if token is None else (-scores[token], i, j, end[j])

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

        out: list[int] = []
        i = 0
        while i < size:
            symbol = piece[i : end[i]]
            token = ids.get(symbol)
            out += unknown(symbol) if token is None else (token,)
            i = end[i]
        return tuple(out)

    remembered = lru_cache(MEMO)(merge)
    boundary = _boundary(ids)

    def encode(text: str) -> list[int]:
        out: list[int] = []
        for piece in boundary.split(text.replace(" ", SPACE)):
            out += remembered(piece) if len(piece) <= MEMO_CHARS else merge(piece)
        return out

    return encode


def _boundary(ids: Mapping[str, int]) -> re.Pattern[str]:
    """Where text can be cut: before a ▁, unless some token holds a ▁ behind the same character."""
    gap = "\ud800"  # between tokens, which come from UTF-8 and cannot hold it
    before = {SPACE, *re.findall(f"([^{SPACE}{gap}]){SPACE}", gap.join(ids))}
    return re.compile(f"(?<=[^{re.escape(''.join(sorted(before)))}])(?={SPACE})")


def to_bytes(token: str) -> bytes:
    """The part of a text, in UTF-8, that a token stands for."""
    return token.replace(SPACE, " ").encode()
