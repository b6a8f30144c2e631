"""Tokenizer: text to ids and back, whatever file the vocabulary came from."""

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """What a token is, by GGUF's and SentencePiece's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # BOS, <|im_end|>: never part of the text
    USER_DEFINED = 4  # matched in the text as it is
    UNUSED = 5
    BYTE = 6  # <0x0A>: a byte of a character that is no token


# What ends an answer, under the names models give it. "</s>" is not one of them: where it is not the EOS of
# the file, it is a tag of HTML.
_ENDS = """
<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|endoftext|> <|end_of_text|> <end_of_turn> <turn|> <eos> <EOT>
_<EOT> <end_of_utterance> <｜end▁of▁sentence｜> <|fim_pad|> <|repo_name|> <reponame> <|file_sep|>
"""
END_OF_GENERATION = frozenset(_ENDS.split())


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer:
    """A vocabulary, and what a model expects around a text. Safe to use from several threads.

    Attributes
    ----------
    bos_id, eos_id : ids of the tokens that begin and end a text, or None.
    eog_ids : every id that ends a generation: EOS, end of turn, ...
    prefix, suffix : ids that `encode` puts around a text; mostly ``(bos_id,)`` and ``()``.
    chat_template : Jinja source of the template that the file brings along, or None.
    tokens, kinds : the vocabulary as the file writes it, and the Kind of each token.
    """

    bos_id: int | None
    eos_id: int | None
    eog_ids: frozenset[int]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    chat_template: str | None
    tokens: Sequence[str]
    kinds: bytes
    _encode: Callable[[str, bool], list[int]]  # (text, parse_special) -> ids, nothing added
    _to_bytes: Callable[[str], bytes]  # what a normal token stands for
    _space_prefix: bool  # encode puts a space before a text, to be taken off again

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def add_bos(self) -> bool:
        """Whether `encode` begins a text with BOS."""
        return self.bos_id in self.prefix

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a text.

        Parameters
        ----------
        text : any string; a lone surrogate counts as U+FFFD.
        add_special : begin with BOS and end with EOS where the model expects it and the text has none yet.
        parse_special : take ``<|im_end|>`` and the like for the tokens of that name. Otherwise they are plain
            text, as they should be in what a user wrote.
        """
        ids = self._encode(_well_formed(text), parse_special)
        if add_special and tuple(ids[: len(self.prefix)]) != self.prefix:
            ids = [*self.prefix, *ids]
        if add_special and self.suffix and tuple(ids[-len(self.suffix) :]) != self.suffix:
            ids = [*ids, *self.suffix]
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Parameters
        ----------
        ids : tokens of a text from its beginning.
        special : write control tokens as their names instead of leaving them out.
        """
        data = b"".join(self.to_bytes(id, special=special) for id in ids)
        return (data.removeprefix(b" ") if self._space_prefix else data).decode("utf-8", "replace")

    def decoder(self, *, special: bool = False, begin: bool = False) -> "Decoder":
        """A decoder that takes one id at a time.

        Parameters
        ----------
        special : as in `decode`.
        begin : the ids begin a text (as those of `decode` do), rather than go on with a prompt.
        """
        return Decoder(self, special, strip=begin and self._space_prefix)

    def token(self, id: int) -> str:
        """A token as the vocabulary writes it, for example ``"▁Hello"`` or ``"ĠHello"``."""
        if not 0 <= id < len(self.tokens):
            raise ValueError(f"token {id} is not one of the vocabulary's {len(self.tokens):,}")
        return self.tokens[id]

    def to_bytes(self, id: int, *, special: bool = False) -> bytes:
        """The part of a text, in UTF-8, that a token stands for; it may be a part of a character."""
        token, kind = self.token(id), self.kinds[id]
        if kind == Kind.NORMAL:
            return self._to_bytes(token)
        if kind == Kind.USER_DEFINED or (special and kind in (Kind.CONTROL, Kind.UNKNOWN)):
            return token.encode()
        return bytes([int(token[3:5], 16)]) if kind == Kind.BYTE else b""


class Decoder:
    """Text from ids as they come, in whole characters."""

    def __init__(self, tokenizer: Tokenizer, special: bool, strip: bool) -> None:
        self._tokenizer, self._special, self._strip = tokenizer, special, strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Take one more id; the text that is complete by now and has not been given yet."""
        data = self._tokenizer.to_bytes(id, special=self._special)
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What was held back: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


def _well_formed(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which has no bytes in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def end_of_generation(tokens: Sequence[str], kinds: bytes, known: Iterable[int | None]) -> frozenset[int]:
    """The ids that a file names as ends, and those of tokens that are ends by their name."""
    marks = map(tokens.index, END_OF_GENERATION.intersection(tokens))
    special = {i for i in marks if kinds[i] in (Kind.CONTROL, Kind.USER_DEFINED)}
    return frozenset(special.union(i for i in known if i is not None))
