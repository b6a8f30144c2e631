"""JSON from files that are not trusted: names once, memory in proportion, and every fault a FormatError."""

import json
import os
import re
from collections.abc import Callable
from typing import Any

from ..errors import FormatError
from .source import AGAIN, Allowance, foreign, open_raw, shown

# The escapes of a JSON text in turn: a surrogate pair, half of one (which is no character), or another.
ESCAPES = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)", re.DOTALL)


def read(path: str | os.PathLike, allowance: Allowance) -> dict[str, Any]:
    """The JSON object that a file holds."""
    raw = open_raw(path, allowance)
    if raw[:512].lstrip()[:1] != b"{":
        raise foreign(path, raw, "a JSON object")
    return parse(raw[:], path, "", allowance)


def parse(
    raw: bytes, path: object, where: str, allowance: Allowance, parse_int: Callable[[str], Any] = int
) -> dict[str, Any]:
    """The JSON object in `raw`, which begins with a brace and is the part `where` of the file `path`."""

    def error(found: str, expected: str = "JSON") -> FormatError:
        return FormatError(path, where, found=found, expected=expected, hint=AGAIN)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for name, value in pairs:
            if name in members:
                raise error(f"the name {shown(name)} twice in an object", "each name once")
            members[name] = value
        return members

    # Upper bounds of what Python makes of a list, an object, a member and a value, and of the text itself.
    costs = ((b"[", 120), (b"{", 500), (b":", 250), (b",", 110))
    text_cost = len(raw) * (3 if raw.isascii() else 9)
    allowance.spend(path, where, text_cost + sum(cost * raw.count(mark) for mark, cost in costs))
    if re.search(rb"\\u[dD][89a-fA-F]", raw) and any(half[1] for half in ESCAPES.finditer(raw)):
        raise error("half of a surrogate pair", "whole characters")
    try:
        return json.loads(raw.decode(), object_pairs_hook=once, parse_int=parse_int)
    except FormatError:
        raise
    except RecursionError:
        raise error("lists or objects too deep in each other") from None
    except ValueError as e:
        raise error(f"a fault: {e}") from None
