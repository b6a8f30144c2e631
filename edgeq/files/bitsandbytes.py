"""bitsandbytes' 4-bit checkpoints: a folder whose linear layers are NF4, their scales 8 bits.

    NAME.weight        U8 (out * in / 2, 1)      two codes a byte, the first in the high bits
     ….absmax          U8 (blocks,), or F32      scale of each run of `blocksize` weights
     ….quant_map       F32 (16,)                 the levels
     ….nested_absmax      F32                    scale of each run of `nested_blocksize` scales
     ….nested_quant_map   F32 (256,)             what a scale's code stands for
     ….quant_state.bitsandbytes__nf4   U8        JSON: "shape", "blocksize", "dtype", "nested_blocksize",
                                                 "nested_offset", ...

    w      = scale * quant_map[code]
    scale  = nested_quant_map[absmax] * nested_absmax + nested_offset        (double quantization)

Runs of weights go on from row to row. Where they are whole rows' parts, and such as the kernels have, a layer
becomes nf4; else it is decoded when it is read, into the type that it was made of.

Source: bitsandbytes 0.50, functional.QuantState.as_dict, whose double quantization is QLoRA's.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .. import formats
from ..errors import FormatError
from ..formats.nf4 import LEVELS
from ..tensor import Tensor
from . import packed
from .output import Entry
from .packed import Layer, Settings, as_bytes
from .source import shown

METHOD = "bitsandbytes"
STATE = "weight.quant_state.bitsandbytes__nf4"
MAPS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
BLOCK, NESTED = 64, 256  # weights, and scales, that share a scale in what is written
STATE_BYTES = 256  # that its JSON is filled up to with spaces
MOST = 1 << 12  # of it in what is read


class Scheme(NamedTuple):
    """How linear layers are stored; on reading, each states it by itself."""


def scheme(format: str, symmetric: bool, group: int | None) -> Scheme:
    """The scheme of such weights; ValueError, of what there is, for others."""
    if format != "nf4" or group != BLOCK:
        raise ValueError(f"nf4 in groups of {BLOCK}")
    return Scheme()


def config(scheme: Scheme) -> dict[str, Any]:
    """The quantization_config of a folder whose linear layers, but for the output matrix, are so."""
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }


def read_config(path: object, raw: Mapping[str, Any]) -> Scheme:
    """The layers say all themselves; FormatError for those of another kind."""
    settings = Settings(path, raw)
    settings.one_of("load_in_4bit", True)
    settings.one_of("bnb_4bit_quant_type", "nf4")
    settings.one_of("bnb_4bit_quant_storage", "uint8", default="uint8")
    return Scheme()


def gather(path: object, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors, each layer's in one."""
    return packed.gather(path, tensors, "weight", (*MAPS, STATE), _weight)


def _weight(layer: Layer) -> Tensor:
    """The weight of a layer."""
    state = _state(layer)
    rows, cols = shape = state["shape"]
    block = state["blocksize"]
    stored = layer.integers("weight", "u1", (-(-rows * cols // 2), 1)).reshape(-1)
    levels = layer.floats("weight.quant_map", (16,))
    if not np.allclose(levels, LEVELS, atol=1e-6):
        raise layer.fail("weight.quant_map", "other levels", "those of NF4")
    blocks = -(-rows * cols // block)
    if "weight.nested_absmax" in layer:
        runs = -(-blocks // state["nested_blocksize"])
        unit = layer.floats("weight.nested_absmax", (runs,)).repeat(state["nested_blocksize"])[:blocks]
        table = layer.floats("weight.nested_quant_map", (256,))
        scale = table[layer.integers("weight.absmax", "u1", (blocks,))] * unit
        scale += np.float32(state["nested_offset"])
    else:
        scale = layer.floats("weight.absmax", (blocks,))
    if cols % block == 0 and packed.runs(cols, cols // block):
        parts = {"scale": np.ascontiguousarray(scale).reshape(rows, -1)}
        return Tensor(layer.name, "nf4", shape, stored, parts)
    codes = np.stack([stored >> 4, stored & 15], axis=1).reshape(-1)[: rows * cols]
    w = LEVELS[codes] * scale.repeat(block)[: rows * cols]
    return formats.quantize(DTYPES[state["dtype"]], w.reshape(shape))._replace(name=layer.name)


def _state(layer: Layer) -> dict[str, Any]:
    """The JSON beside a layer, its values checked."""
    raw = layer.integers(STATE, "u1", (None,))
    try:
        if raw.size > MOST:
            raise ValueError(f"{raw.size} bytes")
        state = json.loads(raw.tobytes())
        shape, dtype = state["shape"], state["dtype"]
        sizes = [*shape, state["blocksize"], state.get("nested_blocksize", 1)]
        offset = state.get("nested_offset", 0.0)
        sound = len(shape) == 2 and dtype in DTYPES and isinstance(offset, float | int)
        if not (sound and all(type(n) is int and 0 < n < 1 << 31 for n in sizes) and np.isfinite(offset)):
            raise ValueError(str(state))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        expected = "JSON with a shape, a blocksize, and the type of the weights"
        raise layer.fail(STATE, shown(str(e)), expected) from None
    return {**state, "shape": tuple(shape), "nested_blocksize": sizes[-1], "nested_offset": offset}


@cache
def dynamic() -> np.ndarray:
    """What an 8-bit code stands for, float32 (256,): 0, 1, and ± the middles of 2ⁱ equal parts of 0.1 … 1,
    times 10^(i - 6), for i from 0 to 6.
    """
    parts = [np.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    positive = np.concatenate([(p[1:] + p[:-1]) / 2 * 10.0 ** (i - 6) for i, p in enumerate(parts)])
    return np.sort(np.concatenate([-positive, positive, [0, 1]])).astype(np.float32)


def doubled(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Scales float32 (blocks,) as codes uint8 (blocks,), the scales of these, and the offset, their mean."""
    offset, table = scale.mean(dtype=np.float64).astype(np.float32), dynamic()
    left = np.pad(scale - offset, (0, -len(scale) % NESTED)).reshape(-1, NESTED)
    unit = np.abs(left).max(axis=1)
    shares = left / np.where(unit > 0, unit, 1)[:, None]
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, shares).astype(np.uint8)
    return codes.reshape(-1)[: len(scale)], unit, offset


def entries(
    tensor: Tensor,
    scheme: Scheme,
    codes: Callable[[], Iterable[np.ndarray]],
    parts: Mapping[str, list[np.ndarray]],
) -> list[Entry]:
    """What stands for a tensor; once its codes are written, `parts` holds the scales."""
    rows, cols = tensor.shape
    if cols % BLOCK:
        raise FormatError(
            METHOD, f"tensor {tensor.name}", found=f"{cols} columns", expected=f"a multiple of {BLOCK}"
        )
    blocks = rows * cols // BLOCK
    runs = -(-blocks // NESTED)

    @cache
    def nested() -> tuple[np.ndarray, np.ndarray, np.float32]:
        return doubled(np.concatenate(parts["scale"]).reshape(-1))

    def state() -> list[np.ndarray]:
        told = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": "float32",
            "shape": [rows, cols],
            "nested_blocksize": NESTED,
            "nested_dtype": "float32",
            "nested_offset": float(nested()[2]),
        }
        return [np.frombuffer(json.dumps(told).encode().ljust(STATE_BYTES), np.uint8)]

    name, base = tensor.name, tensor.name.removesuffix("weight")
    return [
        Entry(name, "U8", (rows * cols // 2, 1), rows * cols // 2, codes),
        Entry(f"{name}.absmax", "U8", (blocks,), blocks, lambda: [nested()[0]]),
        Entry(f"{name}.quant_map", "F32", (16,), 64, lambda: [as_bytes(LEVELS)]),
        Entry(f"{name}.nested_absmax", "F32", (runs,), 4 * runs, lambda: [as_bytes(nested()[1])]),
        Entry(f"{name}.nested_quant_map", "F32", (256,), 1024, lambda: [as_bytes(dynamic())]),
        Entry(f"{base}{STATE}", "U8", (STATE_BYTES,), STATE_BYTES, state),
    ]
