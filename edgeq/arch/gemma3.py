"""Gemma 3, text (arXiv 2503.19786).

    x = embed(ids) * sqrt(dim)
    x += norm(o(attention(q, k, v of norm(x))))          RMS norms on both sides, and on every query and key
    head x += norm(down(gelu(gate(norm(x))) * up(norm(x))))

Five of six layers see a sliding window and turn by a rotary base of 10,000; the sixth sees everything, with
the file's base. A norm gain g multiplies by 1 + g in a Hugging Face checkpoint; GGUF files hold 1 + g.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..kernels.cache import KVCache
from ..kernels.heads import Heads
from ..kernels.rope import Rope, rope
from . import config, huggingface
from .config import Config
from .weights import Weights

HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}

LOCAL_BASE, GLOBAL_BASE = 10000.0, 1e6
GLOBAL_EVERY = 6


# What Transformers takes for granted; the published files leave out most of it.
DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
}


def from_huggingface(c: huggingface.Config) -> dict[str, Any]:
    """GGUF metadata of a config.json."""
    c = huggingface.Config(DEFAULTS | {k: v for k, v in c.raw.items() if v is not None}, c.path)
    if c.raw["hidden_activation"] != "gelu_pytorch_tanh":
        raise c.fail("hidden_activation", "gelu_pytorch_tanh")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if c.raw.get(key):
            raise c.fail(key, "null: Gemma 3 caps no logits")
    meta = c.metadata("gemma3", rope_kind="full_attention", rope_theta=GLOBAL_BASE)
    layers = c.integer("num_hidden_layers")
    every = c.optional_integer("sliding_window_pattern") or c.optional_integer("_sliding_window_pattern")
    kinds = c.raw.get("layer_types") or [
        "sliding_attention" if local else "full_attention"
        for local in local_layers(layers, every or GLOBAL_EVERY)
    ]
    known = isinstance(kinds, list) and all(k in ("sliding_attention", "full_attention") for k in kinds)
    if not known or len(kinds) != layers:
        raise c.fail("layer_types", f"{layers} times sliding_attention or full_attention")
    base = c.number("rope_local_base_freq", LOCAL_BASE)
    if "sliding_attention" in (c.raw.get("rope_parameters") or {}):
        base = c.number("rope_theta", LOCAL_BASE, c.rope("sliding_attention"))
    meta["gemma3.attention.sliding_window"] = c.integer("sliding_window")
    meta["gemma3.attention.sliding_window_pattern"] = np.array([k == "sliding_attention" for k in kinds])
    meta["gemma3.rope.freq_base_swa"] = base
    scale = c.number("query_pre_attn_scalar") ** -0.5
    dim, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    if not math.isclose(scale, attention_scale(layers, dim, heads, c.integer("head_dim")), rel_tol=1e-6):
        meta["edgeq.attention_scale"] = scale
    meta["edgeq.norms_add_one"] = True
    return meta


def attention_scale(layers: int, dim: int, heads: int, head_dim: int) -> float:
    """What GGUF files do not state; the 27B model is the one whose scale is not that of its head."""
    return float((dim // heads if layers == 62 else head_dim) ** -0.5)


def to_huggingface(meta: Mapping[str, Any], weights: Weights) -> tuple[Config, dict[str, Any]]:
    """Shape, and what a config.json says besides it."""
    c, local_base = read_config(meta, weights.vocab_size(), weights.path)
    return c, {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(attention_scale(c.layers, c.dim, c.heads, c.head_dim) ** -2),
        "sliding_window": max(c.windows) or DEFAULTS["sliding_window"],
        "layer_types": ["sliding_attention" if window else "full_attention" for window in c.windows],
        "rope_local_base_freq": local_base,
        "edgeq.norms_add_one": True,
    }


def local_layers(layers: int, every: int) -> list[bool]:
    """Which layers see a window: all but each `every`-th."""
    return [(i + 1) % every != 0 for i in range(layers)]


def read_config(meta: Mapping[str, Any], vocab_size: int, path: object) -> tuple[Config, float]:
    """The model's shape, and the rotary base of the layers with a window."""
    # Ollama's files have names of their own for the two bases, and state a cap of the logits that the model
    # lacks
    base = meta.get("gemma3.rope.global.freq_base", GLOBAL_BASE)
    c = config.read({"gemma3.rope.freq_base": base, **meta}, vocab_size, path, interleaved=False)
    keys = config.Keys(meta, path)
    local = meta.get("gemma3.attention.sliding_window_pattern", GLOBAL_EVERY)
    if isinstance(local, int) and not isinstance(local, bool) and local > 0:  # of how many one sees all
        local = np.array(local_layers(c.layers, local))
    if not isinstance(local, np.ndarray) or local.shape != (c.layers,) or local.dtype != bool:
        raise keys.fail("attention.sliding_window_pattern", local, f"a period or {c.layers} booleans")
    c = replace(c, windows=tuple(c.windows[0] if is_local else 0 for is_local in local))
    base = meta.get("gemma3.rope.local.freq_base", LOCAL_BASE)
    return c, keys.number("rope.freq_base_swa", base)


class Layer:
    """One block: attention, then the gated feed-forward network, each between two norms."""

    def __init__(self, weights: Weights, c: Config, index: int, scale: float, gain_offset: float) -> None:
        at = f"blk.{index}."
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        norm = lambda name, size: weights.gain(f"{at}{name}.weight", size, gain_offset)  # noqa: E731
        self.ops, self.eps, self.index = weights.ops, c.eps, index
        self.attn_norm = norm("attn_norm", c.dim)
        self.qkv = weights.linear(c.dim, {at + "attn_q": q, at + "attn_k": kv, at + "attn_v": kv})
        q_norm, k_norm = norm("attn_q_norm", c.head_dim), norm("attn_k_norm", c.head_dim)
        self.heads = Heads(c.heads, c.kv_heads, c.head_dim, scale, c.windows[index], q_norm, k_norm, c.eps)
        self.o = weights.linear(q, {at + "attn_output": c.dim})
        self.post_attention_norm = norm("post_attention_norm", c.dim)
        self.ffn_norm = norm("ffn_norm", c.dim)
        self.gate_up = weights.linear(c.dim, {at + "ffn_gate": c.ffn, at + "ffn_up": c.ffn})
        self.down = weights.linear(c.ffn, {at + "ffn_down": c.dim})
        self.post_ffw_norm = norm("post_ffw_norm", c.dim)

    def __call__(self, x: np.ndarray, caches: Sequence[KVCache]) -> np.ndarray:
        """x float32 (n, dim) -> (n, dim)."""
        ops, eps = self.ops, self.eps
        h = self.o(
            ops.attention(self.qkv(ops.rms_norm(x, self.attn_norm, eps)), caches, self.index, self.heads)
        )
        x = ops.add(x, ops.rms_norm(h, self.post_attention_norm, eps))
        del h  # `calibrate.walk` has many of it wait
        h = self.down(ops.gated(self.gate_up(ops.rms_norm(x, self.ffn_norm, eps)), "gelu"))
        return ops.add(x, ops.rms_norm(h, self.post_ffw_norm, eps))


class Network:
    """Scaled embedding, blocks, final norm and output head."""

    def __init__(self, meta: Mapping[str, Any], weights: Weights) -> None:
        vocab = weights.vocab_size()
        c, self.local_base = read_config(meta, vocab, weights.path)
        gain_offset = 1.0 if meta.get("edgeq.norms_add_one") else 0.0
        implied = attention_scale(c.layers, c.dim, c.heads, c.head_dim)
        scale = meta.get("edgeq.attention_scale", implied)
        self.config, self.ops = c, weights.ops
        self.embedding_scale = np.float32(c.dim**0.5)
        self.embedding = self.ops.embedding(weights.tensor("token_embd.weight", vocab, c.dim))
        self.layers = [Layer(weights, c, i, scale, gain_offset) for i in range(c.layers)]
        self.norm = weights.gain("output_norm.weight", c.dim, gain_offset)
        self.head = weights.head(vocab, c.dim)

    def ropes(self, positions: int) -> list[Rope]:
        """Each layer's rotary angles for that many positions."""
        c = self.config
        everywhere = rope(positions, c.rope_dims, c.rope_base, c.rope_factors, interleaved=False)
        nearby = rope(positions, c.rope_dims, self.local_base, interleaved=False)
        return [nearby if window else everywhere for window in c.windows]

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """ids (n,) -> scaled embeddings float32 (n, dim)."""
        return self.embedding(ids) * self.embedding_scale

    def forward(self, x: np.ndarray, caches: Sequence[KVCache]) -> np.ndarray:
        """Embedded tokens (n, dim), which end the caches -> hidden states (n, dim), ready for the head."""
        for layer in self.layers:
            x = layer(x, caches)
        return self.ops.rms_norm(x, self.norm, self.config.eps)


def network(meta: Mapping[str, Any], weights: Weights) -> Network:
    """The model of a file."""
    return Network(meta, weights)
