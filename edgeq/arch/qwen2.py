"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama's blocks, with biases on q, k and v and rotary pairs in
halves.
"""

from collections.abc import Mapping
from typing import Any

from . import config, huggingface, llama
from .config import Config
from .weights import Weights

HF_NAMES = llama.HF_NAMES


def from_huggingface(c: huggingface.Config) -> dict[str, Any]:
    """GGUF metadata of a config.json."""
    if c.raw.get("use_sliding_window"):
        raise c.fail("use_sliding_window", "false (no released Qwen2 model uses the window)")
    return c.metadata("qwen2")


def to_huggingface(meta: Mapping[str, Any], weights: Weights) -> tuple[Config, dict[str, Any]]:
    """Shape, and what a config.json says besides it."""
    c = config.read(meta, weights.vocab_size(), weights.path, interleaved=False)
    return c, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}


def network(meta: Mapping[str, Any], weights: Weights) -> llama.Network:
    """The model of a file."""
    return llama.Network(meta, weights, interleaved=False)
