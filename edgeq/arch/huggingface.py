"""From a Hugging Face checkpoint's names to GGUF's, the one dialect that the architectures read."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import FormatError
from ..kernels.rope import llama3_factors
from ..tensor import Tensor

ALIASES = {"mistral": "llama", "gemma3_text": "gemma3"}
WHOLE_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# values that are derived from the config or used in training only
IGNORED = (".rotary_emb.inv_freq",)


class Config:
    """A config.json, with every value checked as it is read."""

    def __init__(self, raw: Mapping[str, Any], path: object) -> None:
        self.raw, self.path = raw, path

    def fail(self, key: str, expected: str) -> FormatError:
        """The error for a key of this file."""
        return FormatError(self.path, f"config.json, {key}", found=repr(self.raw.get(key)), expected=expected)

    def optional_integer(self, key: str) -> int | None:
        """A positive integer, or None when it is absent or null."""
        value = self.raw.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise self.fail(key, "a positive integer")
        return value

    def integer(self, key: str) -> int:
        """A positive integer."""
        value = self.optional_integer(key)
        if value is None:
            raise self.fail(key, "a positive integer")
        return value

    def number(
        self, key: str, default: float | None = None, within: Mapping[str, Any] | None = None
    ) -> float:
        """A finite positive number, of the config or of an object in it."""
        value = (self.raw if within is None else within).get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise FormatError(
                self.path, f"config.json, {key}", found=repr(value), expected="a finite positive number"
            )
        return float(value)

    def rope(self, kind: str | None = None) -> Mapping[str, Any]:
        """The rotary embedding's parameters: `rope_parameters` (of a kind of layers, where it tells them
        apart), or `rope_theta` and `rope_scaling` of older files.
        """
        for key in ("rope_parameters", "rope_scaling"):
            if not isinstance(self.raw.get(key) or {}, dict):
                raise self.fail(key, "an object or null")
        rope = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if kind in rope:
            rope = rope[kind]
            if not isinstance(rope, dict):
                raise self.fail("rope_parameters", "an object for each kind of layers")
        return {"rope_theta": self.raw.get("rope_theta")} | rope

    def metadata(
        self, arch: str, *, rope_kind: str | None = None, rope_theta: float = 10000.0
    ) -> dict[str, Any]:
        """The part of the metadata that all architectures state alike; `rope_theta` where the config has
        none.
        """
        if self.raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise self.fail("hidden_act", "silu")
        heads, dim = self.integer("num_attention_heads"), self.integer("hidden_size")
        head_dim = self.optional_integer("head_dim") or dim // heads
        values: dict[str, Any] = {
            "block_count": self.integer("num_hidden_layers"),
            "context_length": self.integer("max_position_embeddings"),
            "embedding_length": dim,
            "feed_forward_length": self.integer("intermediate_size"),
            "attention.head_count": heads,
            "attention.head_count_kv": self.optional_integer("num_key_value_heads") or heads,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "attention.layer_norm_rms_epsilon": self.number("rms_norm_eps", 1e-6),
        }
        rope = self.rope(rope_kind)
        for partial in (rope, self.raw):
            if partial.get("partial_rotary_factor") not in (None, 1):
                raise self.fail("partial_rotary_factor", "1: heads that turn in part are not supported")
        values["rope.freq_base"] = self.number("rope_theta", rope_theta, rope)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "linear":
            values["rope.scaling.type"] = "linear"
            values["rope.scaling.factor"] = self.number("factor", within=rope)
        elif kind not in ("default", "llama3"):
            raise self.fail("rope_scaling", "rope_type default, linear or llama3")
        return {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in values.items()}

    def rope_factors(self, head_dim: int, base: float) -> np.ndarray | None:
        """Llama 3's frequency divisors, GGUF's tensor rope_freqs; None without that scaling."""
        rope = self.rope()
        if rope.get("rope_type", rope.get("type")) != "llama3":
            return None
        factor, low, high, original = (
            self.number(key, within=rope)
            for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        if low >= high:
            raise self.fail("rope_scaling", "a low_freq_factor below the high_freq_factor")
        return llama3_factors(head_dim, base, factor, low, high, original)


def architecture(raw: Mapping[str, Any]) -> str:
    """Name of the module that knows this config.json's model."""
    name = str(raw.get("model_type"))
    return ALIASES.get(name, name)


def translate(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], module: Any, path: object
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GGUF metadata, and the tensors under their GGUF names; a tensor that no name fits is an error."""
    if isinstance(raw.get("text_config"), dict):  # the text part of a model that also sees
        raw = raw["text_config"]
        tensors = {
            text_name(n): t for n, t in tensors.items() if "language_model." in n or n == "lm_head.weight"
        }
    config = Config(raw, path)
    meta = module.from_huggingface(config)
    arch = meta["general.architecture"]
    inverse = {v: k for k, v in module.HF_NAMES.items()}
    named = {}
    for name, tensor in tensors.items():
        if name.endswith(IGNORED):
            continue
        new = gguf_name(name, inverse)
        if new is None:
            raise FormatError(
                path, f"tensor {name}", found="no place for it", expected=f"the tensors of {arch}"
            )
        named[new] = tensor._replace(name=new)
    head_dim, base = meta[f"{arch}.attention.key_length"], meta[f"{arch}.rope.freq_base"]
    if (factors := config.rope_factors(head_dim, base)) is not None:
        named["rope_freqs.weight"] = Tensor("rope_freqs.weight", "f32", factors.shape, factors.view(np.uint8))
    if raw.get("tie_word_embeddings") and "output.weight" in named:
        del named["output.weight"]
    return meta, named


def text_name(name: str) -> str:
    """A tensor's name without what a model that also sees puts before it."""
    return name.replace("model.language_model.", "model.").replace("language_model.", "")


def gguf_name(name: str, layer_names: Mapping[str, str]) -> str | None:
    """GGUF's name of a tensor, e.g. model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    if name in WHOLE_MODEL:
        return WHOLE_MODEL[name]
    match = re.fullmatch(r"model\.layers\.(\d{1,6})\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in layer_names:
        return None
    return f"blk.{int(match[1])}.{layer_names[match[2]]}.{match[3]}"
