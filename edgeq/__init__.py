"""edgeq: run, quantize, audit and adapt small language models on any CPU.

Importing the package is cheap: NumPy, Numba and the kernels load with the first use of a name below.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import ContextFull, EdgeqError, FormatError, ModelNotFound

if TYPE_CHECKING:
    from . import tokenizer
    from .calibrate import imatrix
    from .evaluate.compare import compare
    from .evaluate.perplexity import perplexity
    from .generate.stream import Stream
    from .llm import LLM, load
    from .quantizers import quantize

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "ContextFull",
    "EdgeqError",
    "FormatError",
    "ModelNotFound",
    "Stream",
    "compare",
    "imatrix",
    "load",
    "perplexity",
    "quantize",
    "tokenizer",
]

_HOME = {
    "LLM": ".llm",
    "Stream": ".generate.stream",
    "compare": ".evaluate.compare",
    "imatrix": ".calibrate",
    "load": ".llm",
    "perplexity": ".evaluate.perplexity",
    "quantize": ".quantizers",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    if name == "tokenizer":
        return importlib.import_module(".tokenizer", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
