"""The tokenizer of a GGUF file as the files of a Hugging Face folder.

Byte-level BPE becomes a tokenizer.json, SentencePiece a tokenizer.model (`sentencepiece` has its fields);
what is around a vocabulary goes to tokenizer_config.json and generation_config.json.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, decoders, processors

from . import bpe, sentencepiece
from .core import Kind, Tokenizer
from .gguf import KEY, from_gguf


def files(meta: Mapping[str, Any], path: object) -> dict[str, bytes]:
    """Contents of the files by name, from GGUF metadata."""
    tokenizer = from_gguf(meta, path)
    settings: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.suffix != (),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id = getattr(tokenizer, f"{name}_id", meta.get(f"{KEY}{key}_token_id"))
        settings[f"{name}_token"] = None if id is None else tokenizer.tokens[id]
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    made = {}
    if meta[KEY + "model"] == "gpt2":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        made["tokenizer.json"] = _byte_level(meta, tokenizer)
    else:
        settings["tokenizer_class"] = "LlamaTokenizer"
        settings["legacy"] = False
        settings["add_prefix_space"] = tokenizer._space_prefix
        # others that are matched as they are stand in tokenizer.model, which spells their spaces
        settings["added_tokens_decoder"] = {
            str(id): {"content": tokenizer.tokens[id], "special": True, "normalized": False}
            | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
            for id in _of_kind(tokenizer, Kind.CONTROL)
        }
        made["tokenizer.model"] = sentencepiece.write(meta)
    made["tokenizer_config.json"] = _json(settings)
    ends = sorted(tokenizer.eog_ids, key=lambda id: (id != tokenizer.eos_id, id))
    made["generation_config.json"] = _json({"bos_token_id": tokenizer.bos_id, "eos_token_id": ends})
    return made


def _byte_level(meta: Mapping[str, Any], tokenizer: Tokenizer) -> bytes:
    """tokenizer.json of a byte-level vocabulary."""
    ids = {token or f"[PAD{id}]": id for id, token in enumerate(tokenizer.tokens)}
    engine = bpe.engine(ids, meta[KEY + "merges"], bpe.CUTS[meta.get(KEY + "pre") or "default"])
    engine.decoder = decoders.ByteLevel()
    for kind in (Kind.CONTROL, Kind.USER_DEFINED):
        special, found = kind == Kind.CONTROL, _of_kind(tokenizer, kind)
        engine.add_tokens([AddedToken(tokenizer.tokens[i], special=special, normalized=False) for i in found])
    around = {tokenizer.tokens[id]: id for id in tokenizer.prefix + tokenizer.suffix}
    if around:
        before, behind = (
            [tokenizer.tokens[id] for id in ids] for ids in (tokenizer.prefix, tokenizer.suffix)
        )
        engine.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *behind], special_tokens=list(around.items())
        )
    return engine.to_str(pretty=True).encode()


def _of_kind(tokenizer: Tokenizer, kind: Kind) -> list[int]:
    return [id for id, its in enumerate(tokenizer.kinds) if its == kind]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
