"""From a Hugging Face checkpoint's names to GGUF's, the one dialect that the architectures read."""

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

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.fail(key, "a positive number")
        return float(value)

    def rope(self, kind: str | None = None) -> dict[str, Any]:
        """The rotary embedding's parameters: `rope_parameters`, or `rope_theta` and `rope_scaling` of older
        files.
        """
        new = self.raw.get("rope_parameters")
        if isinstance(new, dict):
            return new.get(kind, new) if kind else new
        old = self.raw.get("rope_scaling") or {}
        if not isinstance(old, dict):
            raise self.fail("rope_scaling", "an object or null")
        theta = {"rope_theta": self.raw["rope_theta"]} if self.raw.get("rope_theta") else {}
        return old | theta

    def metadata(self, arch: str, rope_kind: str | None = None) -> dict[str, Any]:
        """The part of the metadata that all architectures state alike."""
        if (activation := self.raw.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise self.fail("hidden_act", f"silu, found {activation!r}")
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
        kind = rope.get("rope_type", rope.get("type", "default"))
        values["rope.freq_base"] = float(rope.get("rope_theta", 10000.0))
        if kind == "linear":
            values["rope.scaling.type"], values["rope.scaling.factor"] = "linear", float(rope["factor"])
        elif kind not in ("default", "llama3"):
            raise self.fail("rope_scaling", "rope_type default, linear or llama3")
        return {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in values.items()}

    def rope_factors(self) -> np.ndarray | None:
        """Llama 3's frequency divisors, which GGUF keeps as the tensor rope_freqs."""
        rope = self.rope()
        if rope.get("rope_type", rope.get("type")) != "llama3":
            return None
        try:
            return llama3_factors(
                self.optional_integer("head_dim")
                or self.integer("hidden_size") // self.integer("num_attention_heads"),
                rope.get("rope_theta", 10000.0),
                rope["factor"],
                rope["low_freq_factor"],
                rope["high_freq_factor"],
                rope["original_max_position_embeddings"],
            )
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise self.fail("rope_scaling", "the numbers of Llama 3's scaling") from error


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
        strip = ("language_model.", "model.language_model.")
        tensors = {
            "model." + n.removeprefix("model.language_model.").removeprefix("language_model.model."): t
            for n, t in tensors.items()
            if n.startswith(strip)
        }
    config = Config(raw, path)
    meta = module.from_huggingface(config)
    inverse = {v: k for k, v in module.HF_NAMES.items()}
    named = {}
    for name, tensor in tensors.items():
        if name.endswith(IGNORED):
            continue
        if name in WHOLE_MODEL:
            new = WHOLE_MODEL[name]
        else:
            prefix, _, rest = name.partition("layers.")
            index, _, inner = rest.partition(".")
            inner, _, kind = inner.rpartition(".")
            if (
                prefix != "model."
                or not index.isdecimal()
                or inner not in inverse
                or kind not in ("weight", "bias")
            ):
                raise FormatError(
                    path,
                    f"tensor {name}",
                    found="no place for it",
                    expected=f"the tensors of {meta['general.architecture']}",
                )
            new = f"blk.{int(index)}.{inverse[inner]}.{kind}"
        named[new] = tensor._replace(name=new)
    if (factors := config.rope_factors()) is not None:
        named["rope_freqs.weight"] = Tensor("rope_freqs.weight", "f32", factors.shape, factors.view(np.uint8))
    if raw.get("tie_word_embeddings") and "output.weight" in named:
        del named["output.weight"]
    return meta, named
