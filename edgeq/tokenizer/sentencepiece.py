"""A SentencePiece model (``tokenizer.model``), told in GGUF's terms. The file is a protocol buffer:

    1   piece, repeated      1 text, 2 score (f32), 3 Kind (normal when absent)
    2   trainer              3 kind of model (2: BPE), 40 unknown, 41 begin, 42 end, 43 padding id
    3   normalizer           2 table of rewritten characters, 3 space prefix, 4 removal of extra spaces

Source: sentencepiece_model.proto.
"""

import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import FormatError
from ..files.source import Allowance, open_raw
from .core import Kind

BPE = 2


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Metadata with the keys of a GGUF file that has the same vocabulary."""
    raw = open_raw(path, Allowance())[:]
    try:
        pieces, trainer, normalizer = _parts(raw)
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, AttributeError) as e:
        found = f"a fault: {e}"
        raise FormatError(path, "", found=found, expected="a SentencePiece model") from None
    if not pieces:
        raise FormatError(path, "", found="no vocabulary", expected="a SentencePiece model")
    if trainer.get(3, 1) != BPE:
        raise FormatError(
            path, "trainer_spec.model_type", found=f"{trainer.get(3, 1)}", expected=f"{BPE}, BPE"
        )
    if normalizer.get(2):
        found = f"a table of {len(normalizer[2]):,} bytes"
        raise FormatError(
            path, "normalizer_spec.precompiled_charsmap", found=found, expected="text taken as it is"
        )
    tokens, scores, kinds = zip(*pieces, strict=True)
    meta = {
        "model": "llama",
        # GGUF files write spaces as such in the tokens that are matched in the text as it is.
        "tokens": [
            t.replace("▁", " ") if k == Kind.USER_DEFINED else t for t, k in zip(tokens, kinds, strict=True)
        ],
        "scores": np.array(scores, np.float32),
        "token_type": np.array(kinds, np.int32),
        "add_space_prefix": bool(normalizer.get(3, 1)),
        "remove_extra_whitespaces": bool(normalizer.get(4, 1)),
    }
    for field, name, default in ((40, "unknown", 0), (41, "bos", 1), (42, "eos", 2)):
        number = trainer.get(field, default)
        if number < 1 << 63:  # -1 says that there is none, as a 64-bit number without sign
            meta[f"{name}_token_id"] = number
    meta["add_bos_token"] = "bos_token_id" in meta
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items()}


def _parts(raw: bytes) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    pieces: list[tuple[str, float, int]] = []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for field, value in _fields(raw):
        if field == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append((piece[1].decode(), score, piece.get(3, int(Kind.NORMAL))))
        elif field in specs:
            specs[field] = dict(_fields(value))
    return pieces, specs[2], specs[3]


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a message: numbers as int, all others as bytes."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(raw, at)
        else:
            size = {1: 8, 5: 4}[wire]
        if at + size > len(raw):
            raise IndexError("the file ends in a field")
        yield tag >> 3, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, low ones first, and where it ends."""
    value = shift = 0
    while True:
        value |= (raw[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if raw[at - 1] < 128:
            return value & (1 << 64) - 1, at
