"""Files that hold models, one module a container: what they store, as plain dictionaries.

    gguf          GGUF, one file or several parts
    huggingface   a folder with config.json and safetensors files, plain or quantized:
                  awq, bitnet, compressed_tensors, eetq, gptq, hqq

Each has ``read(path) -> (meta, tensors)``, and raises FormatError for anything that is not sound. The tensors
are views of the mapped file; `release` gives their memory back once they are repacked.
"""

import os
from typing import Any

from ..tensor import Tensor
from . import gguf, huggingface
from .finite import check_finite
from .source import release

__all__ = ["check_finite", "gguf", "huggingface", "read", "release"]


def read(path: str | os.PathLike, *, mmap: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a model: a folder is read as Hugging Face's, a file as GGUF."""
    return (huggingface if os.path.isdir(path) else gguf).read(path, mmap=mmap)
