"""A SentencePiece model (``tokenizer.model``), told in GGUF's terms. The file is a protocol buffer:

    1   piece, repeated      1 text, 2 score (f32), 3 Kind (normal when absent)
    2   trainer              3 kind of model (2: BPE), 4 size, 35 whether it has bytes, 40 unknown, 41 begin,
                             42 end, 43 padding
    3   normalizer           1 name, 2 table of rewritten characters, 3 space prefix, 4 removal of extra
                             spaces

Source: sentencepiece_model.proto.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import FormatError
from ..files.source import Allowance, open_raw
from .core import Kind
from .spm import SPACE

BPE = 2
FIXED = {1: 8, 5: 4}  # bytes of a field by its wire type; 0 is a number, 2 begins with its size


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Metadata with the keys of a GGUF file that has the same vocabulary."""
    raw = open_raw(path, Allowance())[:]
    try:
        meta = _meta(raw)
    except (LookupError, ValueError, TypeError, AttributeError, struct.error) as e:
        raise FormatError(path, "", found=f"a fault: {e}", expected="a SentencePiece model for BPE") from None
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items()}


def _meta(raw: bytes) -> dict[str, Any]:
    """The file's contents by GGUF's keys; any of several exceptions when it is not what it should be."""
    tokens: list[str] = []
    scores: list[float] = []
    kinds: list[Kind] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(raw):
        if field == 1:
            piece = dict(_fields(value))
            kinds.append(Kind(piece.get(3, Kind.NORMAL)))
            token = piece[1].decode()
            # In GGUF files the tokens that are matched in the text as it is have spaces as such.
            tokens.append(token.replace(SPACE, " ") if kinds[-1] == Kind.USER_DEFINED else token)
            scores += struct.unpack("<f", piece.get(2, bytes(4)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if not tokens:
        raise ValueError("no vocabulary")
    if trainer.get(3, 1) != BPE:
        raise ValueError(f"a model of kind {trainer.get(3, 1)}")
    if normalizer.get(2, b"") != b"":
        raise ValueError("a normalizer that rewrites characters")
    meta = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.array(scores, np.float32),
        "token_type": np.array(kinds, np.int32),
        "add_space_prefix": bool(normalizer.get(3, 1)),
        "remove_extra_whitespaces": bool(normalizer.get(4, 1)),
    }
    for field, name, default in ((40, "unknown", 0), (41, "bos", 1), (42, "eos", 2)):
        number = trainer.get(field, default)
        if number < 1 << 63:  # -1, as a 64-bit number without a sign, says that there is none
            meta[f"{name}_token_id"] = number
    meta["add_bos_token"] = "bos_token_id" in meta
    return meta


def write(meta: Mapping[str, Any]) -> bytes:
    """The file of GGUF metadata; `read` gives the vocabulary back.

    The library wants exactly one unknown token, and a text for each.
    """
    get = lambda key, default=None: meta.get(f"tokenizer.ggml.{key}", default)  # noqa: E731
    tokens, scores, unknown = get("tokens"), get("scores"), get("unknown_token_id", 0)
    kinds = np.array(get("token_type", np.ones(len(tokens), np.int32)))
    kinds[kinds == Kind.UNKNOWN] = Kind.CONTROL
    kinds[unknown] = Kind.UNKNOWN
    user, out = int(Kind.USER_DEFINED), []
    for id, (token, score, kind) in enumerate(zip(tokens, scores.tolist(), kinds.tolist(), strict=True)):
        text = token.replace(" ", SPACE) if kind == user else token
        piece = _field(1, text or f"[PAD{id}]") + struct.pack("<BfBB", 2 << 3 | 5, score, 3 << 3, kind)
        out.append(_field(1, piece))
    trainer = (
        _field(3, BPE)
        + _field(4, len(out))
        + _field(35, int((kinds == Kind.BYTE).any()))
        + _field(40, unknown)
    )
    for number, name in ((41, "bos"), (42, "eos"), (43, "padding")):
        trainer += _field(number, get(f"{name}_token_id", -1))
    spaces = int(get("add_space_prefix", True)), int(get("remove_extra_whitespaces", False))
    normalizer = _field(1, "identity") + _field(3, spaces[0]) + _field(4, spaces[1])
    return b"".join(out) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | str | bytes) -> bytes:
    """A field with its tag; a negative number is one of 64 bits."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    """Seven bits a byte, low ones first."""
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a message: numbers as int, all others as bytes."""
    at = 0
    while at < len(raw):
        tag, at = _number(raw, at)
        wire = tag & 7
        if wire == 0:
            value, at = _number(raw, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _number(raw, at)
        elif wire in FIXED:
            size = FIXED[wire]
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(raw):
            raise ValueError("it ends in a field")
        yield tag >> 3, raw[at : at + size]
        at += size


def _number(raw: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, low ones first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at + shift // 7 >= len(raw):
            raise ValueError("it ends in a number")
        byte = raw[at + shift // 7]
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at + shift // 7 + 1
    raise ValueError("a number of more than 64 bits")
