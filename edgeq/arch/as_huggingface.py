"""From GGUF's names to a Hugging Face checkpoint's: the way back from `huggingface`."""

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .. import formats, kernels
from ..errors import FormatError
from ..kernels.rope import llama3_factors
from ..tensor import Tensor
from .config import Config
from .huggingface import WHOLE_MODEL
from .weights import Weights

# Llama 3.1 to 3.3 use these, and lengths of the first training that are powers of two.
LOW, HIGH = 1.0, 4.0
LENGTHS = [8192, *(1 << n for n in range(5, 18))]


class Checkpoint(NamedTuple):
    """What a folder will hold.

    Attributes
    ----------
    config : config.json, without the type of its weights.
    names : name in GGUF -> name there; tensors that the config replaces are left out.
    halves : heads of the tensors whose interleaved rows the folder keeps in halves, by GGUF's name.
    gains_less_one : whether gains of norms are stored less one.
    """

    config: dict[str, Any]
    names: dict[str, str]
    halves: dict[str, int]
    gains_less_one: bool


def checkpoint(
    module: ModuleType, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], path: object
) -> Checkpoint:
    """What becomes of a model's metadata and names; FormatError for a tensor that has no place there."""
    c, own = module.to_huggingface(meta, Weights(tensors, kernels, path))
    less_one = own.pop("edgeq.norms_add_one", False)
    if c.rope_dims != c.head_dim:
        found = f"heads of which {c.rope_dims} of {c.head_dim} numbers turn"
        raise FormatError(path, "rope.dimension_count", found=found, expected="all of them")
    raw = {
        **{key: own.pop(key) for key in ("architectures", "model_type")},
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.context_length,
        "rms_norm_eps": short(c.eps),
        "rope_theta": short(c.rope_base),
        "rope_scaling": _scaling(c, tensors, path),
        "tie_word_embeddings": "output.weight" not in tensors,
        **own,
    }
    whole = {new: name for name, new in WHOLE_MODEL.items()}
    names, halves = {}, {}
    for name in tensors:
        if name == "rope_freqs.weight":
            continue
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        layer, kind, what = match.groups() if match else ("", "", "")
        if name not in whole and kind not in module.HF_NAMES:
            expected = f"the tensors of {raw['model_type']}"
            raise FormatError(path, f"tensor {name}", found="no place for it", expected=expected)
        names[name] = whole.get(name) or f"model.layers.{layer}.{module.HF_NAMES[kind]}.{what}"
        if c.interleaved and kind in ("attn_q", "attn_k"):
            halves[name] = c.heads if kind == "attn_q" else c.kv_heads
    return Checkpoint(raw, names, halves, less_one)


def short(number: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _scaling(c: Config, tensors: Mapping[str, Tensor], path: object) -> dict[str, Any] | None:
    """What config.json says of the rotary frequencies."""
    if "rope_freqs.weight" in tensors:
        factors = formats.dequantize(tensors["rope_freqs.weight"]).reshape(-1)
        largest = float(factors.max())
        for length in LENGTHS:
            theirs = llama3_factors(c.head_dim, c.rope_base, largest, LOW, HIGH, length)
            if factors.shape == theirs.shape and np.allclose(factors, theirs, rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": largest,
                    "low_freq_factor": LOW,
                    "high_freq_factor": HIGH,
                    "original_max_position_embeddings": length,
                }
        expected = f"those of Llama 3, with low_freq_factor {LOW:g} and high_freq_factor {HIGH:g}"
        raise FormatError(path, "tensor rope_freqs.weight", found="other factors", expected=expected)
    return None if c.rope_factors == 1 else {"rope_type": "linear", "factor": float(c.rope_factors)}
