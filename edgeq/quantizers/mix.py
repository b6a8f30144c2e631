"""Mixes: the type of each tensor in a file that is called Q4_K_M, by the names and rules of llama-quantize.

A mix has a base type, which most matrices get. Those that suffer most get more bits: the output matrix, and
in some layers attn_v, attn_output and ffn_down. A type whose blocks do not divide the rows gives way to one
with smaller blocks. Vectors, norms and a few small tensors stay as they are.

Left out are the exceptions for Falcon and GLM, which edgeq does not run, and the mixes of types that it has
not.

Source: llama-quant.cpp of llama.cpp, in llama-cpp-python 0.3.36; tests/golden/mixes.json holds its answers.
"""

import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypedDict

import numpy as np

from .. import formats
from ..convert.source import order
from ..tensor import Tensor


class Mix(NamedTuple):
    """Type of most matrices, and the number of the mix in ``general.file_type``."""

    base: str
    file_type: int


MIXES = {
    "f32": Mix("f32", 0),
    "f16": Mix("f16", 1),
    "bf16": Mix("bf16", 32),
    "q8_0": Mix("q8_0", 7),
    "q6_k": Mix("q6_k", 18),
    "q5_k_m": Mix("q5_k", 17),
    "q5_k_s": Mix("q5_k", 16),
    "q4_k_m": Mix("q4_k", 15),
    "q4_k_s": Mix("q4_k", 14),
    "q3_k_l": Mix("q3_k", 13),
    "q3_k_m": Mix("q3_k", 12),
    "q3_k_s": Mix("q3_k", 11),
    "q2_k": Mix("q2_k", 10),
    "iq4_nl": Mix("iq4_nl", 25),
    "iq4_xs": Mix("iq4_xs", 30),
    "q5_1": Mix("q5_1", 9),
    "q5_0": Mix("q5_0", 8),
    "q4_1": Mix("q4_1", 3),
    "q4_0": Mix("q4_0", 2),
    "tq1_0": Mix("tq1_0", 36),
    "tq2_0": Mix("tq2_0", 37),
    "mxfp4_moe": Mix("mxfp4", 38),
}
FLOATS = ("f32", "f16", "bf16")
ALIASES = {"q5_k": "q5_k_m", "q4_k": "q4_k_m", "q3_k": "q3_k_m"}

# What stands in for a type with blocks of 256 where they do not divide the rows.
SMALLER = {
    "iq4_xs": "iq4_nl",
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}

# Parts of names of matrices that stay as they are: norms, routers, convolutions, positions, other small ones.
KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight|^token_types\.weight|ssm_conv1d|shortconv\.conv\.weight"
    r"|indexer\.[kq]_proj\.weight|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|attn_rel_b\.weight|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_(embd|merger)"
    r"|a\.rvq\.codebook|mm\.a\.code_embd"
)


class Model(NamedTuple):
    """What the rules ask of a model.

    Attributes
    ----------
    layers, experts : number of blocks, and of experts in each.
    values : number of attn_v matrices.
    sharing : query heads to a head of keys and values.
    tied : the embedding is the output matrix, too.
    """

    layers: int
    experts: int
    values: int
    sharing: int
    tied: bool


class Options(TypedDict, total=False):
    """What llama-quantize can be asked beyond the name of a mix.

    Attributes
    ----------
    pure : the base type for all matrices.
    output_tensor_type, token_embedding_type : types of these two.
    tensor_types : regular expression found in a tensor's name -> its type.
    leave_output_tensor : keep the output matrix as it is.
    """

    pure: bool
    output_tensor_type: str | None
    token_embedding_type: str | None
    tensor_types: Mapping[str, str]
    leave_output_tensor: bool


def plan(
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    mix: str,
    *,
    pure: bool = False,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    tensor_types: Mapping[str, str] = MappingProxyType({}),
    leave_output_tensor: bool = False,
    imatrix: bool = False,
) -> dict[str, str]:
    """The type of each tensor, in the order in which llama-quantize writes them.

    Parameters
    ----------
    meta, tensors : of the model, under GGUF's names.
    mix : a name in MIXES.
    pure, output_tensor_type, token_embedding_type, tensor_types, leave_output_tensor : see `Options`.
    imatrix : whether an importance matrix will be used, which a few rules ask.
    """
    base, model = MIXES[mix].base, _model(meta, tensors)
    of_kind = {"token_embd": token_embedding_type, "output": output_tensor_type}
    seen: Counter[str] = Counter()
    types = {}
    for name in sorted(tensors, key=order):
        tensor, kind = tensors[name], _kind(name)
        kept = tensor.rows == 1 or not name.endswith("weight") or KEPT.search(name) is not None
        if kept or (leave_output_tensor and kind == "output"):
            types[name] = tensor.format
            continue
        chosen = of_kind.get(kind)
        if chosen is None:
            chosen = next((t for pattern, t in tensor_types.items() if re.search(pattern, name)), None)
        if chosen is None and (pure or formats.get(base).BLOCK == 1):
            chosen = base
        if chosen is None and (kind == "output" or (kind == "token_embd" and model.tied)):
            chosen = output_tensor_type or _output(mix, base, tensor.cols)
        if chosen is None:
            layer = order(name)[0] if kind == "ffn_down" and model.experts > 1 else seen[kind]
            chosen = _mixed(mix, base, kind, layer, tensor, model, imatrix)
            seen[kind] += 1
        types[name] = fitting(chosen, tensor.cols)
    return types


def fitting(type: str, cols: int) -> str:
    """The type itself, or the first to stand in for it whose blocks divide a row of `cols` weights."""
    while cols % formats.get(type).BLOCK:
        type = SMALLER.get(type, "f16")
    return type


def _model(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    def number(key: str, default: int) -> int:
        """The value, or the first of one for each layer."""
        values = np.ravel(meta.get(f"{meta.get('general.architecture')}.{key}", default))
        return int(values[0]) if values.size and values.dtype.kind in "iu" else default

    heads = number("attention.head_count", 1)
    kv_heads = number("attention.head_count_kv", heads)
    return Model(
        layers=number("block_count", 0),
        experts=number("expert_count", 0),
        values=sum(_kind(name) == "attn_v" for name in tensors),
        sharing=heads // kv_heads if kv_heads else 0,
        tied="output.weight" not in tensors,
    )


def _kind(name: str) -> str:
    """Which rules hold for a tensor."""
    if name in ("output.weight", "token_embd.weight", "per_layer_token_embd.weight"):
        return "output" if name == "output.weight" else "token_embd"
    found = re.search(r"attn_(qkv|kv_b|v|k|output)\.weight|ffn_down", name)
    if found is None:
        return "other"
    return "attn_v" if found[1] in ("qkv", "kv_b") else found[0].removesuffix(".weight")


def _output(mix: str, base: str, cols: int) -> str:
    """Type of the matrix that the logits come from."""
    if base == "q8_0" or mix == "mxfp4_moe" or cols % formats.get(base).BLOCK:
        return "q8_0"
    return "q6_k"


def _mixed(mix: str, base: str, kind: str, i: int, tensor: Tensor, model: Model, imatrix: bool) -> str:
    """Type of a matrix; `i` counts those of its kind."""
    if mix == "mxfp4_moe":
        return "mxfp4" if len(tensor.shape) > 2 and tensor.shape[-3] > 1 else "q8_0"
    if kind in ("attn_v", "attn_k") and model.experts == 8:
        return "q8_0"
    match kind:
        case "attn_v":
            return _attn_v(mix, base, i, model)
        case "attn_output":
            return _attn_output(mix, base, model)
        case "ffn_down":
            return _ffn_down(mix, base, i, model.layers, imatrix)
        case "token_embd" if mix in ("tq1_0", "tq2_0"):
            return "q4_k"
    return base


def _attn_v(mix: str, base: str, i: int, model: Model) -> str:
    """Few weights, on which much depends, all the more where many query heads share them."""
    chosen = base
    match mix:
        case "q2_k":
            chosen = "q4_k" if model.sharing >= 4 else "q3_k"
        case "q3_k_m":
            chosen = "q5_k" if i < 2 else "q4_k"
        case "q3_k_l":
            chosen = "q5_k"
        case "q4_k_s" if i < 4:
            chosen = "q5_k"
        case "q4_k_m" | "q5_k_m" if _important(i, model.values):
            chosen = "q6_k"
        case "iq4_nl" | "iq4_xs" if model.sharing >= 4:
            chosen = "q5_k"
    return "q5_k" if model.layers == 80 and model.sharing > 1 and chosen in ("q3_k", "q4_k") else chosen


def _attn_output(mix: str, base: str, model: Model) -> str:
    if model.experts == 8:
        return "q5_k" if base in ("q2_k", "q4_k", "iq4_nl", "iq4_xs") or mix in ("q3_k_s", "q3_k_m") else base
    return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mix, base)


def _ffn_down(mix: str, base: str, i: int, layers: int, imatrix: bool) -> str:
    early = i < layers // 8
    match mix:
        case "q2_k":
            return "q3_k"
        case "q3_k_m":
            return "q5_k" if i < layers // 16 else "q4_k"
        case "q3_k_l":
            return "q5_k"
        case "q4_k_s" if early:
            return "q5_k"
        case "q4_k_m" | "q5_k_m" if _important(i, layers):
            return "q6_k"
        case "iq4_nl" | "iq4_xs" if early and not imatrix:
            return "q5_k"
        case "q4_0" | "q5_0" if early and imatrix:
            return mix[:-1] + "1"
    return base


def _important(i: int, layers: int) -> bool:
    """The first eighth of the layers, the last, and every third between."""
    return i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2
