"""Tokens that are matched in the text as they are, before anything else looks at it: ``<|im_end|>``, runs of
newlines, tags.

At each place the longest token wins, and the search goes on behind it (as SentencePiece and tokenizers do).
"""

import re
from collections.abc import Callable, Iterator, Mapping


def splitter(ids: Mapping[str, int]) -> Callable[[str], Iterator[str | int]]:
    """A function that cuts a text into ids, where it holds one of these tokens, and the text between them.

    A vocabulary can have thousands of such tokens, too many for one alternation. Nearly every place is ruled
    out by its first two characters; elsewhere, each length that a token with such a head has is looked up.
    """
    if not ids:
        return lambda text: iter([text] if text else [])
    lengths: dict[str, list[int]] = {}
    for n, head in sorted({(len(token), token[:2]) for token in ids}, reverse=True):
        lengths.setdefault(head, []).append(n)
    for head, of_head in lengths.items():
        if len(head) == 2 and head[0] in lengths:  # a token of one character is in reach of all it begins
            of_head.append(1)
    firsts = re.compile(f"[{re.escape(''.join(sorted({head[0] for head in lengths})))}]")

    def split(text: str) -> Iterator[str | int]:
        done = at = 0
        while match := firsts.search(text, at):
            at = match.start()
            for n in lengths.get(text[at : at + 2]) or lengths.get(text[at]) or ():
                if (token := ids.get(text[at : at + n])) is not None:
                    if at > done:
                        yield text[done:at]
                    yield token
                    done = at = at + n
                    break
            else:
                at += 1
        if done < len(text):
            yield text[done:]

    return split
