"""A tokenizer from GGUF metadata.

tokenizer.ggml.model            "gpt2": byte-level BPE; "llama": SentencePiece BPE
tokenizer.ggml.pre              how the first kind cuts text into words (see bpe.py)
tokenizer.ggml.tokens           the vocabulary
tokenizer.ggml.token_type       a Kind for each token; all normal when it is not there
tokenizer.ggml.merges           "left right", best first     (gpt2)
tokenizer.ggml.scores           a number for each token      (llama)
tokenizer.ggml.bos_token_id, eos_token_id, eot_token_id, eom_token_id, unknown_token_id
tokenizer.ggml.add_bos_token, add_eos_token, add_space_prefix, remove_extra_whitespaces
tokenizer.chat_template         Jinja
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import FormatError
from . import bpe, spm
from .core import END_OF_GENERATION, Kind, Tokenizer, end_of_generation
from .special import splitter

KEY = "tokenizer.ggml."
ENDS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
TEXT = (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED)  # what merges may make

Encode = Callable[[str], list[int]]


def from_gguf(
    meta: Mapping[str, Any], path: object = "GGUF metadata", *, unknown_pre: str | None = None
) -> Tokenizer:
    """A tokenizer from the metadata of a GGUF file.

    Parameters
    ----------
    meta : keys and values as `edgeq.files.gguf.read` gives them.
    path : the file's name, for messages.
    unknown_pre : a pre-tokenizer to go on with, for example ``"default"``, where the file names one that is
        not known. The ids may then differ from those that the model was trained on.

    Raises
    ------
    FormatError : when the vocabulary is unsound, or of a kind that edgeq does not know.
    """
    vocabulary = _Vocabulary(meta, path)
    llama = vocabulary.model == "llama"
    cut = None if llama else _cut(vocabulary, unknown_pre)
    encode = _bpe_encoder(vocabulary, cut) if cut else _spm_encoder(vocabulary)
    space_prefix = llama and vocabulary.get("add_space_prefix", bool, True)
    bos = vocabulary.token_id("bos", 1 if llama else None)
    eos = vocabulary.token_id("eos", 2 if llama else None)
    return Tokenizer(
        bos_id=bos,
        eos_id=eos,
        eog_ids=end_of_generation(
            vocabulary.tokens, vocabulary.kinds, [eos, *map(vocabulary.token_id, ENDS)]
        ),
        prefix=vocabulary.added("bos", bos, default=cut.add_bos if cut else True),
        suffix=vocabulary.added("eos", eos, default=False),
        chat_template=vocabulary.chat_template(),
        tokens=vocabulary.tokens,
        kinds=vocabulary.kinds,
        _encode=_with_special(vocabulary, encode, space_prefix),
        _to_bytes=spm.to_bytes if llama else bpe.to_bytes,
        _space_prefix=space_prefix,
    )


class _Vocabulary:
    """Tokens and settings of GGUF metadata, checked as they are read."""

    def __init__(self, meta: Mapping[str, Any], path: object) -> None:
        self.meta, self.path = meta, path
        self.model = self.get("model", str, "")
        if self.model not in ("gpt2", "llama"):
            found = f'"{self.model}"' if self.model else "no tokenizer"
            raise self.error("model", found, '"gpt2" or "llama"')
        self.tokens = self.strings("tokens")
        named = [token for token in self.tokens if token]  # some numbers were never given to a token
        if len(set(named)) != len(named):
            twice, _ = Counter(named).most_common(1)[0]
            raise self.error("tokens", f"{twice!r} twice", "every token once")
        self.kinds = self.token_kinds()

    def error(self, key: str, found: str, expected: str, hint: str = "") -> FormatError:
        return FormatError(self.path, f"key {KEY}{key}", found=found, expected=expected, hint=hint)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.meta.get(KEY + key, default)
        if value is not default and type(value) is not kind:
            raise self.error(key, type(value).__name__, kind.__name__)
        return value

    def strings(self, key: str) -> list[str]:
        value = self.meta.get(KEY + key)
        if not isinstance(value, list) or set(map(type, value)) != {str}:
            raise self.error(key, "none" if value is None else "something else", "an array of strings")
        return value

    def numbers(self, key: str, kinds: str) -> np.ndarray:
        """An array with a number for each token, of one of NumPy's kinds of dtype."""
        value, n = self.meta.get(KEY + key), len(self.tokens)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or value.shape != (n,):
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise self.error(key, found, f"{n:,} numbers")
        return value

    def token_id(self, name: str, default: int | None = None) -> int | None:
        """A special token's id, or None; a default only counts where the vocabulary reaches that far."""
        value, n = self.get(f"{name}_token_id", int), len(self.tokens)
        if value is None:
            return default if default is not None and default < n else None
        if not 0 <= value < n:
            raise self.error(f"{name}_token_id", f"{value:,}", f"an id below {n:,}")
        return value

    def added(self, name: str, id: int | None, *, default: bool) -> tuple[int, ...]:
        """The "bos" or "eos" id where it is to be put around a text."""
        wanted = self.get(f"add_{name}_token", bool)
        if wanted and id is None:
            raise self.error(f"add_{name}_token", "true", f"a {name}_token_id with it")
        return () if id is None or not (default if wanted is None else wanted) else (id,)

    def chat_template(self) -> str | None:
        value = self.meta.get("tokenizer.chat_template")
        if value is not None and type(value) is not str:
            found = type(value).__name__
            raise FormatError(self.path, "key tokenizer.chat_template", found=found, expected="str")
        return value

    def token_kinds(self) -> bytes:
        """The Kind of each token."""
        if KEY + "token_type" not in self.meta:
            return bytes([Kind.NORMAL]) * len(self.tokens)
        kinds = self.numbers("token_type", "iu")
        kinds = np.where(kinds == 0, Kind.UNUSED, kinds)  # 0 is GGUF's "undefined"
        if kinds.min() < Kind.NORMAL or kinds.max() > Kind.BYTE:
            raise self.error("token_type", f"{kinds.min()} to {kinds.max()}", "0 to 6")
        for i in np.flatnonzero(kinds == Kind.BYTE):
            if not BYTE.fullmatch(self.tokens[i]):
                raise self.error("token_type", f"byte token {self.tokens[i]!r}", 'such as "<0x0A>"')
        # Some files have the end of a turn as a token that users may write.
        for i in np.flatnonzero(kinds == Kind.USER_DEFINED):
            if self.tokens[i] in END_OF_GENERATION:
                kinds[i] = Kind.CONTROL
        return kinds.astype(np.uint8).tobytes()

    def of_kind(self, *kinds: Kind) -> dict[str, int]:
        """Ids of all tokens of these kinds."""
        chosen = np.flatnonzero(np.isin(np.frombuffer(self.kinds, np.uint8), kinds)).tolist()
        ids = dict(zip(map(self.tokens.__getitem__, chosen), chosen, strict=True))
        ids.pop("", None)
        return ids


def _cut(v: _Vocabulary, unknown_pre: str | None) -> bpe.Cut:
    """How the model that the vocabulary belongs to cuts text into words."""
    name = v.get("pre", str, "")
    if not name:
        warnings.warn(
            f"{v.path}: no {KEY}pre, which says how to cut text into words. Going on with the default, which "
            "may not be what the model was trained with",
            stacklevel=3,
        )
    cut = bpe.CUTS.get(name or "default") or bpe.CUTS.get(unknown_pre or "")
    if cut is None:
        hint = 'unknown_pre="default" goes on with a cut that may not be the one the model was trained with'
        raise v.error("pre", f'"{name}"', f"one of {', '.join(sorted(bpe.CUTS))}", hint)
    return cut


def _bpe_encoder(v: _Vocabulary, cut: bpe.Cut) -> Encode:
    merges, ids = v.strings("merges"), v.of_kind(*TEXT)
    for merge in merges:
        if merge.count(" ") != 1:
            raise v.error("merges", repr(merge), "two tokens and a space between them")
        if merge.replace(" ", "") not in ids:
            raise v.error("merges", repr(merge), "merges of tokens into tokens")
    return bpe.encoder(ids, merges, cut)


def _spm_encoder(v: _Vocabulary) -> Encode:
    scores = v.numbers("scores", "fiu").astype(np.float64)
    if not np.isfinite(scores).all():
        raise v.error("scores", "NaN or infinity", "finite numbers")
    byte_ids = {int(token[3:5], 16): i for token, i in v.of_kind(Kind.BYTE).items()}
    unknown_id = v.token_id("unknown", 0) or 0

    def unknown(char: str) -> list[int]:
        return [byte_ids.get(b, unknown_id) for b in char.encode()] if byte_ids else [unknown_id]

    return spm.encoder(v.of_kind(*TEXT), scores.tolist(), unknown)


def _with_special(v: _Vocabulary, encode: Encode, space_prefix: bool) -> Callable[[str, bool], list[int]]:
    """Encoder of text that may hold special tokens; control tokens are plain text unless asked for."""
    plain = splitter(v.of_kind(Kind.USER_DEFINED))
    parsing = splitter(v.of_kind(Kind.USER_DEFINED, Kind.CONTROL, Kind.UNKNOWN))
    tidy = v.get("remove_extra_whitespaces", bool, False)

    def encode_all(text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        after_token = True
        for part in (parsing if parse_special else plain)(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                part = re.sub(" +", " ", part).lstrip(" ").rstrip(" ▁") if tidy else part
                ids += encode(" " + part if part and space_prefix and after_token else part)
            after_token = isinstance(part, int)
        return ids

    return encode_all
