"""A model to be written again: metadata and tensors as GGUF has them, whatever it is read from.

Of a Hugging Face folder only vectors are converted at once, which are small; matrices stay where they are,
with a note on the order of their rows.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import arch, files, formats
from ..errors import FormatError
from ..files import gguf
from ..tensor import Tensor
from ..tokenizer import as_gguf


class Source(NamedTuple):
    """A model.

    Attributes
    ----------
    path : where it is read from.
    meta : GGUF's keys, as `files.gguf_writer` takes them.
    tensors : under GGUF's names; the bytes are the file's.
    rows : of tensors whose rows GGUF wants in another order, that order: int (rows,).
    """

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    rows: Mapping[str, np.ndarray]


def open_source(path: str | os.PathLike) -> Source:
    """The model in a GGUF file or a Hugging Face folder; FormatError when GGUF has no words for it."""
    path = Path(path)
    return _from_huggingface(path) if path.is_dir() else Source(path, *gguf.read_exact(path), rows={})


def plain(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with Python's numbers in the place of GGUF's, as `arch` takes it."""
    return {key: v.item() if isinstance(v, np.generic) else v for key, v in meta.items()}


def interleaved(heads: int, rows: int) -> np.ndarray:
    """Order in which a Hugging Face checkpoint's rows of q or k make the pairs of GGUF's llama files: those
    of a head's halves in turn. int (rows,).
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _from_huggingface(path: Path) -> Source:
    _, meta, named = arch.identify(*files.read(path), path)
    meta = dict(meta)
    halves, add_one = (meta.pop(f"edgeq.{key}", False) for key in ("rope_in_halves", "norms_add_one"))
    for key in meta:
        if key.startswith("edgeq."):
            found = f"{key.removeprefix('edgeq.')} {meta[key]:g}"
            raise FormatError(path, "config.json", found=found, expected="one that GGUF files can state")
    name = meta["general.architecture"]
    heads = {
        "attn_q": meta[f"{name}.attention.head_count"],
        "attn_k": meta[f"{name}.attention.head_count_kv"],
    }
    rows, tensors = {}, {}
    for key, tensor in named.items():
        kind = key.split(".")[-2]
        if halves and kind in heads:
            n, expected = tensor.shape[0], heads[kind] * meta[f"{name}.attention.key_length"]
            if n != expected:
                raise FormatError(path, f"tensor {key}", found=f"{n} rows", expected=f"{expected}")
            rows[key] = interleaved(heads[kind], n)
        if len(tensor.shape) == 1:
            w = formats.dequantize(tensor).reshape(-1)[rows.pop(key, slice(None))]
            w = w + np.float32(1) if add_one and key.endswith("norm.weight") else w
            tensor = Tensor(key, "f32", tensor.shape, np.ascontiguousarray(w).view(np.uint8))
        tensors[key] = tensor
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise FormatError(path, "", found="no token embedding", expected="one")
    weights = sum(t.rows * t.cols for t in tensors.values())
    meta |= {
        "general.type": "model",
        "general.name": path.resolve().name,
        "general.size_label": size_label(weights),
        f"{name}.vocab_size": embedding.rows,
    }
    if halves:  # llama.cpp's own files of this architecture state it
        meta[f"{name}.rope.dimension_count"] = meta[f"{name}.attention.key_length"]
    meta |= as_gguf.metadata(path, embedding.rows)
    return Source(path, meta, tensors, rows)


def size_label(weights: int) -> str:
    """A number of weights as models are named: 135M, 1.1B."""
    power = max(1, min((len(str(weights)) - 1) // 3, 4))
    scaled = weights / 1000**power
    return f"{scaled:.{1 if scaled < 9.5 else 0}f}{' KMBT'[power]}"


def order(name: str) -> tuple[int, str]:
    """Sorts tensors as llama-quantize does: those of no layer, then layer by layer, by name."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name)
