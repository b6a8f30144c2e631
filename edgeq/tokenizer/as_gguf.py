"""The tokenizer of a Hugging Face folder, told in GGUF's terms (see gguf.py).

A byte-level vocabulary takes its tokens and merges from tokenizer.json; its way to cut text into words must
be one that GGUF has a name for, and is found by trying them on a text made for the purpose. A SentencePiece
vocabulary takes its scores from tokenizer.model, or makes them from the order of the merges. Both are tried
on that text again when they are done: what GGUF cannot state is an error here, not another tokenization
there.
"""

import json
import os
from typing import Any

import numpy as np
import tokenizers

from ..errors import FormatError
from . import bpe, sentencepiece
from .core import Kind, Tokenizer, end_of_generation
from .gguf import KEY, from_gguf
from .huggingface import Folder, from_engine, from_huggingface, json_engine, sentencepiece_metadata

# What ways to cut text differ in: runs of spaces and digits, contractions, capitals, scripts, signs.
SAMPLE = (
    " \n\n \t\t x  y   z\n\n\n\n a\r\n\r\n1 22 333 4444 55555 123456789 3.14 1,000,000 v2beta3 ½ ٣٤ "
    "I'll we'RE don't THEY'VE it'S 'tis camelCaseWord HTTPServer ÉCOLE naïve été "
    "你好，世界！日本語のテキスト 한국어 नमस्ते ไทย Привет мир שלום "
    "🙂👩‍👩‍👧 ... !!?? --- === __init__(self): //## $5 <b>€</b> a/b\\c {x: [1]} ~`^| “quoted” "
)

WORST = -1e6  # score of a token that no merge should make


def metadata(folder: str | os.PathLike, rows: int) -> dict[str, Any]:
    """The keys ``tokenizer.*`` of a folder's tokenizer, with a token for each of the model's `rows`.

    Raises
    ------
    FormatError : when GGUF cannot state it, or the vocabulary has more tokens than the model has rows.
    """
    f = Folder(folder)
    meta, expected = _told(f, rows)  # the library's objects are let go before others are made
    if from_gguf(meta, f.path).encode(SAMPLE, parse_special=True) != expected:
        found = "a vocabulary that gives other ids once it is in GGUF's form"
        raise FormatError(f.path, "", found=found, expected="byte-level or SentencePiece BPE")
    return meta


def _told(f: Folder, rows: int) -> tuple[dict[str, Any], list[int]]:
    """The keys, and the ids of the sample by the folder's own tokenizer."""
    if (f.path / "tokenizer.json").exists():
        engine = json_engine(f)
        tokenizer = from_engine(f, engine)
        vocabulary = _vocabulary(f, engine, tokenizer)
    else:
        tokenizer, path = from_huggingface(f.path), f.sentencepiece()
        assert path is not None  # the tokenizer was made of it
        vocabulary = {k: v for k, v in sentencepiece_metadata(f, path).items() if v is not None}
        vocabulary[KEY + "pre"] = "default"
    extra = rows - tokenizer.vocab_size
    if extra < 0:
        found = f"{tokenizer.vocab_size:,} tokens"
        raise FormatError(f.path, "", found=found, expected=f"at most {rows:,}, the rows of the embedding")
    tokens = [*tokenizer.tokens, *[""] * extra]
    meta = vocabulary | {
        # llama.cpp wants every token to have a name of its own
        KEY + "tokens": [token or f"[PAD{id}]" for id, token in enumerate(tokens)],
        KEY + "token_type": np.array([*tokenizer.kinds, *[Kind.UNUSED] * extra], np.int32),
    }
    if KEY + "scores" in meta:
        missing = rows - len(meta[KEY + "scores"])
        meta[KEY + "scores"] = np.pad(meta[KEY + "scores"], (0, missing), constant_values=WORST)
    return meta | _special(f, tokenizer), tokenizer.encode(SAMPLE, parse_special=True)


def _vocabulary(f: Folder, engine: tokenizers.Tokenizer, tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.json says of the vocabulary, besides its tokens."""
    path = f.path / "tokenizer.json"
    model = json.loads(engine.model.__getstate__())
    if model["type"] != "BPE":
        raise FormatError(path, "model", found=model["type"], expected="BPE")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if tokenizer._to_bytes is bpe.to_bytes:
        return {
            KEY + "model": "gpt2",
            KEY + "pre": _pre(engine, model["ignore_merges"], tokenizer.add_bos, path),
            KEY + "merges": merges,
        }
    return {
        KEY + "model": "llama",
        KEY + "pre": "default",
        KEY + "scores": _scores(f, tokenizer, merges),
        KEY + "add_space_prefix": tokenizer._space_prefix,
    }


def _pre(engine: tokenizers.Tokenizer, whole_words: bool, add_bos: bool, path: object) -> str:
    """GGUF's name for the way in which a tokenizer cuts text into words."""

    def words(cutter: Any) -> list[str]:
        return [word for word, _ in cutter.pre_tokenize_str(SAMPLE)]

    theirs = words(engine.pre_tokenizer) if engine.pre_tokenizer else None
    alike = [
        n
        for n, cut in bpe.CUTS.items()
        if cut.whole_words == whole_words and words(bpe.cutter(cut)) == theirs
    ]
    if not alike:
        found = "a way to cut text into words that GGUF has no name for"
        raise FormatError(path, "pre_tokenizer", found=found, expected=f"one of {', '.join(bpe.CUTS)}")
    return next((name for name in alike if bpe.CUTS[name].add_bos == add_bos), alike[0])


def _scores(f: Folder, tokenizer: Tokenizer, merges: list[str]) -> np.ndarray:
    """A score for each token, float32: those of the SentencePiece model, else by the order of the merges."""
    if (path := f.sentencepiece()) is not None:
        return sentencepiece.read(path)[KEY + "scores"]
    ranks = {merge.replace(" ", ""): -rank for rank, merge in reversed([*enumerate(merges)])}
    return np.array([ranks.get(token, -len(merges)) for token in tokenizer.tokens], np.float32)


def _special(f: Folder, tokenizer: Tokenizer) -> dict[str, Any]:
    """Special tokens, what is put around a text, and the chat template."""
    ids = {token: id for id, token in enumerate(tokenizer.tokens) if token}
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    named = {
        "bos": bos,
        "eos": eos,
        "unknown": f.special_id("unk", ids.get),
        "padding": f.special_id("pad", ids.get),
    }
    known = end_of_generation(tokenizer.tokens, tokenizer.kinds, [eos])
    named |= dict(zip(("eot", "eom"), sorted(tokenizer.eog_ids - known), strict=False))
    for around, id in ((tokenizer.prefix, bos), (tokenizer.suffix, eos)):
        if around not in ((), (id,)):
            found = f"tokens {around} around a text"
            raise FormatError(f.path, "post_processor", found=found, expected="none, or BOS and EOS")
    meta: dict[str, Any] = {f"{KEY}{name}_token_id": id for name, id in named.items() if id is not None}
    meta[KEY + "add_bos_token"], meta[KEY + "add_eos_token"] = tokenizer.prefix != (), tokenizer.suffix != ()
    if tokenizer.chat_template is not None:
        meta["tokenizer.chat_template"] = tokenizer.chat_template
    return meta
