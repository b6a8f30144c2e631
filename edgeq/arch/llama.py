"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783) and the many models that share its blocks: Llama 1-3.x,
Mistral, SmolLM2, TinyLlama.

    x += o(attention(q, k, v of norm(x)))          rotary positions, grouped-query attention
    x += down(silu(gate(norm(x))) * up(norm(x)))

Biases are used where the file has them; a file without an output matrix ties it to the embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import FormatError
from ..kernels.cache import KVCache
from ..kernels.heads import Heads
from ..kernels.rope import Rope, rope
from . import config, huggingface
from .config import Config
from .weights import Weights

HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def from_huggingface(c: huggingface.Config) -> dict[str, Any]:
    """GGUF metadata of a config.json."""
    meta = c.metadata("llama")
    if window := c.optional_integer("sliding_window"):
        meta["llama.attention.sliding_window"] = window
    return meta | {"edgeq.rope_in_halves": True}


def to_huggingface(meta: Mapping[str, Any], weights: Weights) -> tuple[Config, dict[str, Any]]:
    """Shape, and what a config.json says besides it."""
    c = config.read(meta, weights.vocab_size(), weights.path, interleaved=True)
    if c.windows[0]:  # the one thing in which Mistral differs
        return c, {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "sliding_window": c.windows[0],
        }
    biased = [f"blk.0.{name}.bias" in weights.tensors for name in ("attn_q", "attn_output", "ffn_up")]
    if biased[0] != biased[1]:
        found = f"biases of {'attn_q' if biased[0] else 'attn_output'} alone"
        expected = "those of both or of none, as Hugging Face's Llama has them"
        raise FormatError(weights.path, "tensor blk.0.attn_q.bias", found=found, expected=expected)
    return c, {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": biased[0],
        "mlp_bias": biased[2],
    }


def network(meta: Mapping[str, Any], weights: Weights) -> "Network":
    """The model of a file."""
    return Network(meta, weights)


class Layer:
    """One block: attention, then the gated feed-forward network."""

    def __init__(self, weights: Weights, c: Config, index: int, head_norms: bool) -> None:
        at = f"blk.{index}."
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.ops, self.eps, self.index = weights.ops, c.eps, index
        self.attn_norm = weights.gain(at + "attn_norm.weight", c.dim)
        self.qkv = weights.linear(c.dim, {at + "attn_q": q, at + "attn_k": kv, at + "attn_v": kv})
        q_norm, k_norm = (
            weights.gain(at + f"attn_{x}_norm.weight", c.head_dim) if head_norms else None for x in "qk"
        )
        self.heads = Heads(
            c.heads, c.kv_heads, c.head_dim, c.head_dim**-0.5, c.windows[index], q_norm, k_norm, c.eps
        )
        self.o = weights.linear(q, {at + "attn_output": c.dim})
        self.ffn_norm = weights.gain(at + "ffn_norm.weight", c.dim)
        self.gate_up = weights.linear(c.dim, {at + "ffn_gate": c.ffn, at + "ffn_up": c.ffn})
        self.down = weights.linear(c.ffn, {at + "ffn_down": c.dim})

    def __call__(self, x: np.ndarray, caches: Sequence[KVCache]) -> np.ndarray:
        """x float32 (n, dim) -> (n, dim)."""
        ops, eps = self.ops, self.eps
        h = self.o(
            ops.attention(self.qkv(ops.rms_norm(x, self.attn_norm, eps)), caches, self.index, self.heads)
        )
        x = ops.add(x, h)
        del h  # `calibrate.walk` has many of it wait
        return ops.add(x, self.down(ops.gated(self.gate_up(ops.rms_norm(x, self.ffn_norm, eps)), "silu")))


class Network:
    """Embedding, blocks, final norm and output head; with RMS norms of each query and key head on request."""

    def __init__(
        self, meta: Mapping[str, Any], weights: Weights, *, interleaved: bool = True, head_norms: bool = False
    ) -> None:
        vocab = weights.vocab_size()
        c = config.read(meta, vocab, weights.path, interleaved=interleaved)
        if "rope_freqs.weight" in weights.tensors:
            factors = weights.vector("rope_freqs.weight", c.rope_dims // 2)
            c = replace(c, rope_factors=c.rope_factors * factors)
        self.config, self.ops = c, weights.ops
        self.embed = self.ops.embedding(weights.tensor("token_embd.weight", vocab, c.dim))
        self.layers = [Layer(weights, c, i, head_norms) for i in range(c.layers)]
        self.norm = weights.gain("output_norm.weight", c.dim)
        self.head = weights.head(vocab, c.dim)

    def ropes(self, positions: int) -> list[Rope]:
        """Each layer's rotary angles for that many positions."""
        c = self.config
        table = rope(positions, c.rope_dims, c.rope_base, c.rope_factors, interleaved=c.interleaved)
        return [table] * c.layers

    def forward(self, x: np.ndarray, caches: Sequence[KVCache]) -> np.ndarray:
        """Embedded tokens (n, dim), which end the caches -> hidden states (n, dim), ready for the head."""
        for layer in self.layers:
            x = layer(x, caches)
        return self.ops.rms_norm(x, self.norm, self.config.eps)
