"""Qwen3 (arXiv 2505.09388): Llama's blocks without biases, an RMS norm on every query and key head before the
rotary embedding, whose pairs are in halves.
"""

from collections.abc import Mapping
from typing import Any

from . import config, huggingface, llama
from .config import Config
from .weights import Weights

HF_NAMES = llama.HF_NAMES | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


def from_huggingface(c: huggingface.Config) -> dict[str, Any]:
    """GGUF metadata of a config.json."""
    if c.raw.get("use_sliding_window"):
        raise c.fail("use_sliding_window", "false (no released Qwen3 model uses the window)")
    return c.metadata("qwen3")


def to_huggingface(meta: Mapping[str, Any], weights: Weights) -> tuple[Config, dict[str, Any]]:
    """Shape, and what a config.json says besides it."""
    c = config.read(meta, weights.vocab_size(), weights.path, interleaved=False)
    return c, {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "use_sliding_window": False,
    }


def network(meta: Mapping[str, Any], weights: Weights) -> llama.Network:
    """The model of a file."""
    return llama.Network(meta, weights, interleaved=False, head_norms=True)
