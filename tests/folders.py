"""Hugging Face folders of tiny models, made complete with a tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

GOLDEN = Path(__file__).parent / "golden" / "arch"
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>")


def byte_level(size: int, *, add_bos: bool = False) -> Tokenizer:
    """A vocabulary of special tokens, printable ASCII, spelled spaces and newlines, and a few merges."""
    tokens = [*SPECIAL, *map(chr, range(33, 127)), "Ġ", "Ċ"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("Ġ", "Ġ"), ("'", "s")]
    tokens += [a + b for a, b in merges]
    ids = {
        token: id for id, token in enumerate([*tokens, *(f"<extra{i}>" for i in range(size - len(tokens)))])
    }
    engine = Tokenizer(models.BPE(ids, merges))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if add_bos:
        engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return engine


def complete(name: str, folder: Path, *, size: int | None = None, **config: Any) -> Path:
    """A copy of a golden model in `folder`, with changes to its config, and a tokenizer of `size` tokens."""
    shutil.copytree(GOLDEN / name, folder)
    raw = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw))
    byte_level(size or raw["vocab_size"]).save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{{ messages }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
