"""A tokenizer from a Hugging Face folder.

    tokenizer.json              vocabulary and rules, run by the tokenizers library as they stand; or
    tokenizer.model             a SentencePiece model, also under another name if it is the only one
    tokenizer_config.json       bos_token, eos_token, add_bos_token, add_eos_token, chat_template, ...
    chat_template.jinja         instead of the template in it
    generation_config.json      eos_token_id: one, or all that end an answer
    config.json                 bos_token_id, eos_token_id, vocab_size

All but the first two may be missing.
"""

import dataclasses
import json
import os
import threading
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ..errors import FormatError
from ..files import strict_json
from ..files.source import Allowance, inside, open_raw
from . import bpe, sentencepiece, spm
from .core import Kind, Tokenizer, end_of_generation
from .gguf import BYTE, KEY, from_gguf

MAX_GAP = 1 << 16  # ids that may be missing in a vocabulary, or that a model may have beyond it


def from_huggingface(folder: str | os.PathLike) -> Tokenizer:
    """A tokenizer from a Hugging Face folder; FormatError when a file is unsound or of an unknown kind."""
    f = Folder(folder)
    if (f.path / "tokenizer.json").exists():
        return from_engine(f, json_engine(f))
    path = f.sentencepiece()
    if path is None:
        found = ", ".join(sorted(path.name for path in f.path.glob("*.model"))) or "no vocabulary"
        raise FormatError(f.path, "", found=found, expected="tokenizer.json or tokenizer.model")
    return _from_sentencepiece(f, path)


class Folder:
    """The settings around a vocabulary, from whichever file has them."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path, self.allowance = Path(folder), Allowance()
        self.tokenizer, self.generation, config = map(
            self.settings, ("tokenizer_config.json", "generation_config.json", "config.json")
        )
        text = config.get("text_config")  # of a model of text and images
        self.config = config | text if isinstance(text, dict) else config

    def settings(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return strict_json.read(inside(path, self.path), self.allowance) if path.exists() else {}

    def error(self, name: str, where: str, found: object, expected: str) -> FormatError:
        return FormatError(self.path / name, where, found=repr(found)[:80], expected=expected)

    def sentencepiece(self) -> Path | None:
        """The SentencePiece model: tokenizer.model, or the only one of another name."""
        found = [path.name for path in self.path.glob("*.model")]
        name = found[0] if len(found) == 1 else "tokenizer.model"
        return inside(self.path / name, self.path) if name in found else None

    def flag(self, name: str) -> bool | None:
        value = self.tokenizer.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error("tokenizer_config.json", name, value, "true or false")
        return value

    def special_id(self, name: str, find: Callable[[str], int | None]) -> int | None:
        """Id of the "bos" or "eos" token, by its text in the tokenizer's settings or the model's number."""
        if f"{name}_token" in self.tokenizer:
            token = self.tokenizer[f"{name}_token"]
            token = token.get("content") if isinstance(token, dict) else token
            if token is None:
                return None
            if not isinstance(token, str) or find(token) is None:
                expected = "a token of the vocabulary"
                raise self.error("tokenizer_config.json", f"{name}_token", token, expected)
            return find(token)
        return next(iter(self.model_ids(name)), None)

    def model_ids(self, name: str) -> list[int]:
        """What generation_config.json and config.json call `name`_token_id: none, one or several."""
        ids: list[int] = []
        for file, settings in (("generation_config.json", self.generation), ("config.json", self.config)):
            value = settings.get(f"{name}_token_id")
            for id in value if isinstance(value, list) else [value]:
                if id is not None and (type(id) is not int or id < 0):
                    raise self.error(file, f"{name}_token_id", id, "the id of a token")
                ids += [] if id is None else [id]
        return ids

    def size(self, n: int, path: Path) -> int:
        """Size of a vocabulary of `n` tokens and of those that only the model has, which have no text."""
        rows = self.config.get("vocab_size", n)
        if type(rows) is not int or rows > n + MAX_GAP:
            raise FormatError(path, "", found=f"{n:,} tokens", expected=f"{rows}, as config.json has it")
        return max(rows, n)

    def added_tokens(self) -> dict[int, dict[str, Any]]:
        """Tokens that the settings add to a vocabulary: id -> {"content": text, "special": bool}."""
        added = self.tokenizer.get("added_tokens_decoder", {})
        for id, token in added.items() if isinstance(added, dict) else [(added, None)]:
            sound = isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"]
            if not sound or not id.isdecimal():
                raise self.error("tokenizer_config.json", "added_tokens_decoder", id, "an id with a token")
        return {int(id): token for id, token in added.items()}

    def chat_template(self) -> str | None:
        path = self.path / "chat_template.jinja"
        if path.exists():
            try:
                return open_raw(inside(path, self.path), self.allowance)[:].decode()
            except UnicodeDecodeError as e:
                raise FormatError(path, "", found=str(e), expected="text in UTF-8") from None
        template = self.tokenizer.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if template is not None and not isinstance(template, str):
            raise self.error("tokenizer_config.json", "chat_template", template, "a template")
        return template


def json_engine(f: Folder) -> tokenizers.Tokenizer:
    """The library's tokenizer of tokenizer.json."""
    path = inside(f.path / "tokenizer.json", f.path)
    try:
        engine = tokenizers.Tokenizer.from_buffer(open_raw(path, f.allowance)[:])
        engine.no_truncation()
        engine.no_padding()
    except Exception as e:  # the library raises nothing more specific
        raise FormatError(path, "", found=f"a fault: {e}", expected="a tokenizer") from e
    return engine


def from_engine(f: Folder, engine: tokenizers.Tokenizer) -> Tokenizer:
    """A tokenizer that the tokenizers library runs."""
    path = f.path / "tokenizer.json"
    to_bytes, byte_fallback, space_prefix = _decoding(engine, path)
    prefix, suffix = _around(engine, path)

    vocabulary = engine.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    if not 0 < size < len(vocabulary) + MAX_GAP:
        raise FormatError(path, "", found=f"{len(vocabulary):,} tokens", expected=f"{size:,}")
    size = f.size(size, path)
    tokens, kinds = [""] * size, bytearray([Kind.UNUSED]) * size
    for token, id in vocabulary.items():
        tokens[id] = token
        kinds[id] = Kind.BYTE if byte_fallback and BYTE.fullmatch(token) else Kind.NORMAL
    for id, added in engine.get_added_tokens_decoder().items():
        kinds[id] = Kind.CONTROL if added.special else Kind.USER_DEFINED

    bos, eos = (f.special_id(name, engine.token_to_id) for name in ("bos", "eos"))
    for special in (bos, eos, *prefix, *suffix):
        if special is not None and special >= size:
            raise FormatError(
                f.path, "", found=f"special token {special:,}", expected=f"an id below {size:,}"
            )
    lock = threading.Lock()

    def encode(text: str, parse_special: bool) -> list[int]:
        with lock:
            engine.encode_special_tokens = not parse_special
            return engine.encode(text, add_special_tokens=False).ids

    return Tokenizer(
        bos_id=bos,
        eos_id=eos,
        eog_ids=end_of_generation(tokens, bytes(kinds), [eos, *(i for i in f.model_ids("eos") if i < size)]),
        prefix=_with(prefix, bos, f.flag("add_bos_token"), at=0),
        suffix=_with(suffix, eos, f.flag("add_eos_token"), at=len(suffix)),
        chat_template=f.chat_template(),
        tokens=tokens,
        kinds=bytes(kinds),
        _encode=encode,
        _to_bytes=to_bytes,
        _space_prefix=space_prefix,
    )


def _decoding(engine: tokenizers.Tokenizer, path: Path) -> tuple[Callable[[str], bytes], bool, bool]:
    """What a token stands for, whether <0x0A> is a byte, and whether a text begins with a space of ours."""
    by_type = {step["type"]: step for step in _steps(engine.decoder, "decoders")}
    if "ByteLevel" in by_type:
        return bpe.to_bytes, False, False
    fallback = "ByteFallback" in by_type
    if "Metaspace" in by_type:
        return spm.to_bytes, fallback, by_type["Metaspace"].get("prepend_scheme") != "never"
    if by_type.get("Replace", {}).get("pattern") == {"String": spm.SPACE}:
        return spm.to_bytes, fallback, by_type.get("Strip", {}).get("start", 0) > 0
    expected = "ByteLevel, Metaspace or Replace ▁"
    raise FormatError(path, "decoder", found=", ".join(by_type) or "none", expected=expected)


def _around(engine: tokenizers.Tokenizer, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the file's post-processor puts before and behind a text."""
    before: list[int] = []
    behind: list[int] = []
    for step in _steps(engine.post_processor, "processors"):
        if step["type"] == "TemplateProcessing":
            parts = [_piece_ids(step, piece, path) for piece in step["single"]]
            if parts.count(None) != 1:
                raise FormatError(path, "post_processor", found=f"{parts.count(None)} texts", expected="1")
            at = parts.index(None)
            before = [*chain(*parts[:at]), *before]
            behind = [*behind, *chain(*parts[at + 1 :])]
        elif step["type"] in ("BertProcessing", "RobertaProcessing"):
            before, behind = [step["cls"][1], *before], [*behind, step["sep"][1]]
    return tuple(before), tuple(behind)


def _piece_ids(template: dict[str, Any], piece: dict[str, Any], path: Path) -> Any:
    """Ids of a special token in a template, or None for the place of the text."""
    if "Sequence" in piece:
        return None
    token = template["special_tokens"].get(piece["SpecialToken"]["id"])
    if token is None:
        raise FormatError(path, "post_processor", found=str(piece)[:80], expected="a token in special_tokens")
    return token["ids"]


def _steps(component: Any, nested: str) -> list[dict[str, Any]]:
    """The parts of a component of the library, as its JSON has them; those of a sequence one by one."""
    steps = [json.loads(component.__getstate__())] if component else []
    for step in steps:  # grows while it is read
        steps += step.get(nested, ())
    return steps


def _with(ids: tuple[int, ...], id: int | None, wanted: bool | None, at: int) -> tuple[int, ...]:
    """The ids with or without one of them, as settings want it; as they are where the settings do not say."""
    if wanted is None or id is None or wanted == (id in ids):
        return ids
    return (*ids[:at], id, *ids[at:]) if wanted else tuple(i for i in ids if i != id)


def _from_sentencepiece(f: Folder, path: Path) -> Tokenizer:
    """A tokenizer from a SentencePiece model and the tokens that settings add to it."""
    tokenizer = from_gguf(sentencepiece_metadata(f, path), path)
    ends = (i for i in f.model_ids("eos") if i < tokenizer.vocab_size)
    return dataclasses.replace(tokenizer, eog_ids=tokenizer.eog_ids.union(ends))


def sentencepiece_metadata(f: Folder, path: Path) -> dict[str, Any]:
    """A SentencePiece model and the tokens that settings add to it, told in GGUF's terms."""
    meta = sentencepiece.read(path)
    tokens, kinds = meta[KEY + "tokens"], meta[KEY + "token_type"].tolist()
    for id, added in sorted(f.added_tokens().items()):
        if id > len(tokens):
            raise f.error("tokenizer_config.json", "added_tokens_decoder", id, f"an id up to {len(tokens):,}")
        special = added.get("special")
        # as in `sentencepiece`, which the content follows where it has ▁ for a space
        tokens[id : id + 1] = [added["content"] if special else added["content"].replace(spm.SPACE, " ")]
        kinds[id : id + 1] = [Kind.CONTROL if special else Kind.USER_DEFINED]
    extra = f.size(len(tokens), path) - len(tokens)
    meta[KEY + "tokens"] = tokens + [""] * extra
    meta[KEY + "token_type"] = np.array(kinds + [Kind.UNUSED] * extra, np.int32)
    meta[KEY + "scores"] = np.resize(meta[KEY + "scores"], len(tokens) + extra)
    meta["tokenizer.chat_template"] = f.chat_template()

    ids = {token: id for id, token in enumerate(tokens)}
    for name in ("bos", "eos"):
        special, wanted = f.special_id(name, ids.get), f.flag(f"add_{name}_token")
        if special is not None:
            meta[f"{KEY}{name}_token_id"] = special
        if wanted is not None:
            meta[f"{KEY}add_{name}_token"] = wanted
    return meta
