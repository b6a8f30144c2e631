"""Text to token ids and back, as the file of a model says.

core            Tokenizer and its streaming Decoder
gguf            a tokenizer from GGUF metadata
huggingface     a tokenizer from a folder with tokenizer.json or tokenizer.model
bpe, spm        the two ways to order the merges of characters into tokens
merge           the merging
special         tokens that are matched in the text as they are
sentencepiece   reads tokenizer.model
"""

import os
from pathlib import Path

from ..files import gguf as gguf_file
from . import sentencepiece
from .core import Decoder, Kind, Tokenizer
from .gguf import from_gguf
from .huggingface import from_huggingface

__all__ = ["Decoder", "Kind", "Tokenizer", "from_gguf", "from_huggingface", "load"]


def load(path: str | os.PathLike, *, unknown_pre: str | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Parameters
    ----------
    path : a GGUF file, also one with a vocabulary only; a Hugging Face folder, or its tokenizer.json; or a
        SentencePiece ``.model``.
    unknown_pre : see `from_gguf`.

    Raises
    ------
    FormatError : when the file is unsound, or its vocabulary of a kind that edgeq does not know.
    """
    path = Path(path)
    if path.is_dir():
        return from_huggingface(path)
    if path.name == "tokenizer.json":
        return from_huggingface(path.parent)
    if path.suffix == ".model":
        return from_gguf(sentencepiece.read(path), path)
    return from_gguf(gguf_file.read(path)[0], path, unknown_pre=unknown_pre)
