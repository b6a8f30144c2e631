"""A conversation as token ids, in which only the chat template's own special tokens are special.

Whoever types ``<|im_end|>`` must not end their turn by it. The rendered text is encoded as a whole, because
tokens reach across the seams between template and messages; but a message that names a special token is kept
out of it: a mark goes through the template in its place, and its ids, as plain text, are put where the mark
comes out.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from . import template
from .errors import EdgeqError
from .tokenizer import Tokenizer

MARK = "\ue0ff"  # private use; stands on both sides of the number of a message


def chat_ids(
    tokenizer: Tokenizer, source: str, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> list[int]:
    """Ids of `messages` in the template `source`, up to where the answer begins; BOS is never doubled."""
    encode = partial(tokenizer.encode, add_special=False)
    quoted: list[list[int]] = []

    def quote(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: quote(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [quote(v) for v in value]
        if not isinstance(value, str):
            return value
        text = value.strip()  # the space around it stays in sight of templates that trim
        plain = encode(text)
        if plain == encode(text, parse_special=True) and MARK not in text:
            return value
        quoted.append(plain)
        return value.replace(text, f"{MARK}{len(quoted) - 1}{MARK}")

    bos, eos = ("" if i is None else tokenizer.token(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    text = template.render(source, quote(messages), bos_token=bos, eos_token=eos, **variables)
    ids: list[int] = []
    for i, part in enumerate(re.split(f"{MARK}([0-9]+){MARK}", text)):
        if MARK in part:
            raise EdgeqError(
                "the chat template takes a message apart that names special tokens: they cannot be told from "
                "its own, leave them out of the message"
            )
        ids += quoted[int(part)] if i % 2 else encode(part, parse_special=True)
    prefix = list(tokenizer.prefix)  # BOS; most templates write it themselves
    return ids if ids[: len(prefix)] == prefix else prefix + ids
