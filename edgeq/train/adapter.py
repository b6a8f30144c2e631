"""Adapters as files.

    PEFT     a folder: adapter_config.json, adapter_model.safetensors with
                 base_model.model.MODULE.lora_A.weight    (r, cols)
                 base_model.model.MODULE.lora_B.weight    (rows, r)
                 base_model.model.MODULE.base_layer.bias  (rows,), or MODULE.bias where there is no pair
    GGUF     a file as llama.cpp has it: general.type "adapter", adapter.type "lora", adapter.lora.alpha,
                 TENSOR.lora_a   (r, cols)
                 TENSOR.lora_b   (rows, r); the scale is alpha / r

Hugging Face keeps the rows of q and k in halves, GGUF's llama files interleave them (see
``kernels/rope.py``); an adapter in memory has the order of its model.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .. import formats
from ..arch import huggingface
from ..arch.config import Config
from ..convert.source import interleaved
from ..errors import EdgeqError, FormatError
from ..files import gguf, gguf_writer, safetensors, safetensors_writer, strict_json
from ..files.output import Entry, whole
from ..files.source import Allowance, inside
from .lora import Adapter, Pair, Settings, module_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
INTERLEAVED = ("llama",)  # architectures whose GGUF files interleave rows
# what PEFT can add to a LoRA that edgeq has no arithmetic for
UNKNOWN = (
    "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "arrow_config",
)  # fmt: skip


def read(path: Path, module: ModuleType, config: Config) -> Adapter:
    """The adapter in a PEFT folder or a GGUF file, for a model of that architecture and shape.

    Raises
    ------
    FormatError : for what is no sound LoRA, or one for another model.
    """
    if path.is_dir():
        return _from_peft(path, module, config)
    return _from_gguf(path, config)


def check(path: object, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """FormatError unless every matrix and bias of the adapter is one of the model, which has these shapes."""
    wanted = {name: (len(pair.b), pair.a.shape[1]) for name, pair in adapter.pairs.items()}
    wanted |= {name: bias.shape for name, bias in adapter.biases.items()}
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            found = f"one of {shapes[name]}" if name in shapes else "no such tensor"
            hint = "It is an adapter for another model"
            raise FormatError(path, name, found=f"a change of {shape}", expected=found, hint=hint)


def ordered(w: np.ndarray, name: str, *, config: Config, given: bool, wanted: bool) -> np.ndarray:
    """Rows w (rows, ...) of a tensor in halves (False) or interleaved (True), in the order that is wanted."""
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2])
    if given == wanted or heads is None:
        return w
    order = interleaved(heads, len(w))
    return np.ascontiguousarray(w[order if wanted else np.argsort(order)])


def _from_peft(folder: Path, module: ModuleType, config: Config) -> Adapter:
    allowance = Allowance()
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).exists():
            raise FormatError(folder, "", found=f"no {file}", expected="a folder as PEFT writes it")
    raw = strict_json.read(inside(folder / CONFIG, folder), allowance)
    path = folder / CONFIG
    if raw.get("peft_type") != "LORA":
        raise FormatError(path, "peft_type", found=repr(raw.get("peft_type")), expected="LORA")
    for key in UNKNOWN:
        if raw.get(key):
            raise FormatError(path, key, found=repr(raw[key]), expected="a plain LoRA, without it")
    tensors = safetensors.read(inside(folder / WEIGHTS, folder), allowance)
    inverse = {v: k for k, v in module.HF_NAMES.items()}
    found: dict[str, dict[str, np.ndarray]] = {"lora_A": {}, "lora_B": {}, "bias": {}}
    for key, tensor in tensors.items():
        inner, _, what = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        inner = huggingface.text_name(inner.removesuffix(".base_layer"))
        name = huggingface.gguf_name(f"{inner}.weight", inverse) or ""
        if what not in found or not name:
            expected = f"lora_A, lora_B or bias of a matrix of {config.name}"
            raise FormatError(folder / WEIGHTS, f"tensor {key}", found="it", expected=expected)
        found[what][name] = formats.dequantize(tensor).reshape(tensor.shape)
    turn = partial(ordered, config=config, given=False, wanted=config.interleaved)
    a, b, biases = found.values()
    scales = {name: _scale(path, raw, module_name(module, name), len(a[name])) for name in a}
    pairs = _pairs(folder / WEIGHTS, a, {n: turn(w, n) for n, w in b.items()}, scales)
    return Adapter(pairs, {n.removesuffix("weight") + "bias": turn(w, n) for n, w in biases.items()})


def _scale(path: Path, raw: Mapping[str, Any], module: str, rank: int) -> float:
    """Scale of a module's pair, whose rank and alpha may be its own."""

    def of(key: str, pattern: str, default: float) -> float:
        own = raw.get(pattern) or {}
        value = raw.get(key, default)
        if isinstance(own, dict):
            value = next((v for k, v in own.items() if module == k or module.endswith("." + k)), value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise FormatError(path, key, found=repr(value), expected="a positive number")
        return float(value)

    r, alpha = of("r", "rank_pattern", 8), of("lora_alpha", "alpha_pattern", 8)
    if r != rank:
        raise FormatError(path, "r", found=f"{r:g}", expected=f"{rank}, the rank of {module}")
    return alpha / (r**0.5 if raw.get("use_rslora") else r)


def _pairs(
    path: Path,
    a: Mapping[str, np.ndarray],
    b: Mapping[str, np.ndarray],
    scales: Mapping[str, float],
) -> dict[str, Pair]:
    """Both sides of each matrix together."""
    for name in a.keys() ^ b.keys():
        raise FormatError(path, f"pair of {name}", found="one side", expected="both")
    if not a:
        raise FormatError(path, "", found="no pair of matrices", expected="a LoRA adapter")
    for name in a:
        if a[name].ndim != 2 or b[name].ndim != 2 or len(a[name]) != b[name].shape[1]:
            found = f"shapes {a[name].shape} and {b[name].shape}"
            raise FormatError(path, f"pair of {name}", found=found, expected="(r, cols) and (rows, r)")
    return {name: Pair(a[name], b[name], scales[name]) for name in a}


def _from_gguf(path: Path, config: Config) -> Adapter:
    meta, tensors = gguf.read(path)
    expected = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": config.name,
    }
    for key, value in expected.items():
        if meta.get(key) != value:
            raise FormatError(path, key, found=repr(meta.get(key)), expected=repr(value))
    alpha = meta.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not 0 <= alpha < float("inf"):
        raise FormatError(path, "adapter.lora.alpha", found=repr(alpha), expected="a positive number")
    sides: dict[str, dict[str, np.ndarray]] = {"lora_a": {}, "lora_b": {}}
    for key, tensor in tensors.items():
        name, _, side = key.rpartition(".")
        if side not in sides or name == "token_embd.weight":
            raise FormatError(path, f"tensor {key}", found="it", expected="lora_a and lora_b of linears")
        sides[side][name] = formats.dequantize(tensor).reshape(tensor.shape)
    a, b = sides.values()
    turn = partial(ordered, config=config, given=config.name in INTERLEAVED, wanted=config.interleaved)
    scales = {name: alpha / len(a[name]) if alpha else 1.0 for name in a}
    return Adapter(_pairs(path, a, {n: turn(w, n) for n, w in b.items()}, scales), {})


def write_peft(
    folder: Path, adapter: Adapter, settings: Settings, module: ModuleType, config: Config, base: str
) -> None:
    """Write a folder as PEFT does; what is in it by the names of its two files is replaced.

    base : name or path of the model that the adapter belongs to.
    """
    arrays: dict[str, np.ndarray] = {}
    turn = partial(ordered, config=config, given=config.interleaved, wanted=False)
    for name, (a, b, scale) in adapter.pairs.items():
        assert scale == settings.scale
        inner = PREFIX + module_name(module, name)
        arrays |= {f"{inner}.lora_A.weight": a, f"{inner}.lora_B.weight": turn(b, name)}
    for name, bias in adapter.biases.items():
        matrix = name.removesuffix("bias") + "weight"
        beside = ".base_layer" if matrix in adapter.pairs else ""
        arrays[f"{PREFIX}{module_name(module, matrix)}{beside}.bias"] = turn(bias, matrix)
    targets = sorted({module_name(module, name).split(".")[-1] for name in adapter.pairs})
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.use_rslora,
        "bias": settings.bias,
        "target_modules": targets,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / WEIGHTS, arrays)
    with whole(folder / CONFIG, nbytes=1 << 14) as (new,):
        new.write_text(json.dumps(raw, indent=2) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write float32 arrays as a safetensors file."""
    entries = [entry(name, "F32", array) for name, array in arrays.items()]
    with whole(path, nbytes=sum(e.nbytes for e in entries) + (1 << 20)) as (new,):
        safetensors_writer.write_file(new, entries)


def write_gguf(path: Path, adapter: Adapter, config: Config) -> None:
    """Write a file as llama.cpp reads it; EdgeqError for an adapter with biases, which such files lack."""
    if adapter.biases:
        raise EdgeqError("a GGUF adapter has no biases: keep the PEFT folder, or merge the adapter")
    scales = {pair.scale * len(pair.a) for pair in adapter.pairs.values()}
    alpha = scales.pop() if len(scales) == 1 else 0.0  # for llama.cpp, 0 is a scale of 1
    meta = {
        "general.architecture": config.name,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(alpha),
    }
    entries = []
    for name, (a, b, scale) in adapter.pairs.items():
        b = ordered(b, name, config=config, given=config.interleaved, wanted=config.name in INTERLEAVED)
        entries.append(entry(f"{name}.lora_a", 0, a))
        entries.append(entry(f"{name}.lora_b", 0, b if alpha else b * np.float32(scale)))
    gguf_writer.write(path, meta, entries)


def entry(name: str, type: int | str, array: np.ndarray) -> Entry:
    """A float32 array as writers take it."""
    array = np.ascontiguousarray(array, np.float32)
    return Entry(name, type, array.shape, array.nbytes, lambda: [array.reshape(-1).view(np.uint8)])
