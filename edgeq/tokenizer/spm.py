"""SentencePiece's byte-pair encoding: the neighbors whose union has the best score are joined first, until no
union is a token.

    "▁Hello"  →  ▁ H e l l o  →  ▁ H el l o  →  ▁ Hel lo  →  ▁Hello

The tokenizers library merges by the rank of a pair; here it is by the score of the result, and pairs that
make the same token are equals. The two differ on runs of one character.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from . import merge

SPACE = "▁"  # U+2581 stands for a space


def encoder(
    ids: Mapping[str, int], scores: Sequence[float], unknown: Callable[[str], list[int]]
) -> Callable[[str], list[int]]:
    """A function text -> ids, by the score of each id; `unknown` is for a character that is no token."""

    def order(piece: str, i: int, j: int, k: int) -> float | None:
        token = ids.get(piece[i:k])
        return None if token is None else -scores[token]

    def of_symbol(symbol: str) -> Sequence[int]:
        token = ids.get(symbol)
        return unknown(symbol) if token is None else (token,)

    of_piece = merge.encoder(order, of_symbol)
    boundary = _boundary(ids)  # pieces of text that merge on their own are short, and repeat

    def encode(text: str) -> list[int]:
        return [id for piece in boundary.split(text.replace(" ", SPACE)) for id in of_piece(piece)]

    return encode


def _boundary(ids: Mapping[str, int]) -> re.Pattern[str]:
    """Where text can be cut: before a ▁, unless some token holds a ▁ behind the same character."""
    gap = "\ud800"  # between tokens, which come from UTF-8 and cannot hold it
    within = gap.join(token for token in ids if token.rfind(SPACE) > 0)
    before = {SPACE, *re.findall(f"([^{SPACE}{gap}]){SPACE}", within)}
    return re.compile(f"(?<=[^{re.escape(''.join(sorted(before)))}])(?={SPACE})")


def to_bytes(token: str) -> bytes:
    """The part of a text, in UTF-8, that a token stands for."""
    return token.replace(SPACE, " ").encode()
