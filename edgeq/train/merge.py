"""Adapters made part of a model's own weights, and adapters from one kind of file to the other.

    W' = W + s B A, in the type that the tensor has, or in another

What is quantized is encoded anew, which costs a little: a merged model of floats answers exactly as the
adapter beside it does.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .. import arch, catalog, files, formats, kernels, quantizers
from ..arch import config
from ..arch.config import Config
from ..arch.weights import Weights
from ..convert.stream import Recoding
from ..errors import EdgeqError
from ..tensor import Tensor
from . import adapter
from .lora import Settings, module_name


def described(path: Path) -> tuple[ModuleType, Config, dict[str, Tensor]]:
    """A model's architecture, shape, and tensors by GGUF's names."""
    module, meta, tensors = arch.identify(*files.read(path), path)
    vocab = Weights(tensors, kernels, path).vocab_size()
    interleaved = meta["general.architecture"] in adapter.INTERLEAVED
    return module, config.read(meta, vocab, path, interleaved=interleaved), dict(tensors)


def merge(
    model: str | os.PathLike[str],
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    out: str | os.PathLike[str],
    *,
    type: str | None = None,
    threads: int | None = None,
    progress: Any = None,
) -> list[Path]:
    """Write a model with adapters in its weights, as a GGUF file.

    Parameters
    ----------
    model : a name of the catalog, a GGUF file, or a Hugging Face folder.
    adapters : paths, and a scale for each.
    out : the file.
    type : of the tensors that change, a name in `formats` that GGUF has; None keeps what each one has.
    threads, progress : as in `quantizers.quantize`.
    """
    if type is not None and formats.get(type).GGML is None:
        raise ValueError(f"GGUF files have no type for {type}")
    source = catalog.resolve(model, progress)
    module, shape, tensors = described(source)
    changes: dict[str, Any] = {}
    shapes = {name: t.shape for name, t in tensors.items()}
    for path, factor in adapters:
        found = adapter.read(Path(path), module, shape)
        adapter.check(path, found, shapes)
        for name, (a, b, scale) in found.pairs.items():
            changes[name] = changes.get(name, 0) + np.float32(scale * factor) * (b @ a)
        for name, bias in found.biases.items():
            before = formats.dequantize(tensors[name]).reshape(-1)
            changes[name] = changes.get(name, 0) + np.float32(factor) * (bias - before)
    made = {}
    for name, change in changes.items():
        old = tensors[name]
        made[name] = float_tensor(name, formats.dequantize(old).reshape(old.shape) + change)
    wanted = {name: type or tensors[name].format for name in made if len(shapes[name]) > 1}
    return write(source, made, wanted, out, threads=threads, progress=progress)


def float_tensor(name: str, w: np.ndarray) -> Tensor:
    """An array as a tensor in float32."""
    return Tensor(name, "f32", w.shape, np.ascontiguousarray(w, np.float32).reshape(-1).view(np.uint8))


def write(
    source: Path,
    made: Mapping[str, Tensor],
    wanted: Mapping[str, str],
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Any = None,
) -> list[Path]:
    """Write a model with other tensors in the place of some of its own, as a GGUF file.

    made : the others, with rows in the model's order.
    wanted : formats of those that are to be encoded.
    """
    plan = quantizers.plan(source, "copy")
    _, shape, _ = described(source)
    for i, r in enumerate(plan.recodings):
        if (tensor := made.get(r.tensor.name)) is None:
            continue
        if len(tensor.shape) == 1:  # matrices are put in GGUF's order as they are written
            w = formats.dequantize(tensor).reshape(-1)
            order = shape.name in adapter.INTERLEAVED
            w = adapter.ordered(w, tensor.name, config=shape, given=shape.interleaved, wanted=order)
            plan.recodings[i] = Recoding(float_tensor(tensor.name, w), "f32")
        else:
            plan.recodings[i] = Recoding(tensor, wanted.get(tensor.name, tensor.format), r.rows)
    return quantizers.write(plan, out, threads=threads, progress=progress)


def convert(model: str | os.PathLike[str], path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the adapter of a model as the other kind of file: GGUF if `out` ends so, else a PEFT folder."""
    source = catalog.resolve(model)
    module, shape, tensors = described(source)
    found, out = adapter.read(Path(path), module, shape), Path(out)
    adapter.check(path, found, {name: t.shape for name, t in tensors.items()})
    if out.suffix == ".gguf":
        adapter.write_gguf(out, found, shape)
        return
    ranks = {(len(pair.a), pair.scale) for pair in found.pairs.values()}
    if len(ranks) > 1:
        raise EdgeqError("the pairs of this adapter differ in rank or scale: a PEFT folder is for equal ones")
    r, scale = ranks.pop()
    targets = tuple(sorted({module_name(module, name).split(".")[-1] for name in found.pairs}))
    settings = Settings(r=r, lora_alpha=scale * r, target_modules=targets)
    adapter.write_peft(out, found, settings, module, shape, str(model))
