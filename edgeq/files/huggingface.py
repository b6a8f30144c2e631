"""A Hugging Face folder: the configuration of a model, and its weights in safetensors files.

    config.json                        architecture and sizes; all that must be there, besides weights
    model.safetensors                  the weights, or instead of it
    model.safetensors.index.json         {"weight_map": {tensor name: file name}, ...} and those files
    generation_config.json             defaults of sampling, end-of-text tokens
    tokenizer_config.json              special tokens, chat template; tokenizer.json is for edgeq.tokenizer

Nothing is imported or unpickled from the folder, and no name in it leads out of it.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..tensor import Tensor
from . import aqlm, awq, bitnet, bitsandbytes, compressed_tensors, eetq, gptq, hqq, safetensors, strict_json
from .source import SAFER, Allowance, all_there, brief, inside, shown

Load = Callable[[Path], dict[str, Tensor]]
QUANTIZED = {
    module.METHOD: module for module in (aqlm, awq, bitnet, bitsandbytes, compressed_tensors, eetq, gptq, hqq)
}

SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}\.safetensors")
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read(path: str | os.PathLike, *, mmap: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the configuration of a model in a Hugging Face folder, and map its tensors.

    Parameters
    ----------
    path : the folder.
    mmap : map the weights (the default), or read them all now: slower, but safe where the files may change.

    Returns
    -------
    meta : ``{"config": ..., "generation_config": ..., "tokenizer_config": ...}``, each as its JSON file has
    it;
        ``{}`` when one of the last two is not there.
    tensors : name -> Tensor, under the names the files give them, in format f32, f16 or bf16; of a quantized
        folder also i2, i3, i4, i8, nf4, ternary or aqlm (see the modules in QUANTIZED).

    Raises
    ------
    FormatError : when a file is unsound or missing, or the weights are quantized in another way.
    """
    folder, allowance = Path(path), Allowance()
    meta = {}
    for name in ("config", "generation_config", "tokenizer_config"):
        file = folder / f"{name}.json"
        if file.exists():
            meta[name] = strict_json.read(inside(file, folder), allowance)
        elif name == "config":
            found = [p.name for p in sorted(folder.glob("*.gguf"))]
            hint = f"Give the GGUF file itself: {shown(str(folder / found[0]))}" if found else ""
            raise FormatError(folder, "", found="no config.json", expected="a Hugging Face folder", hint=hint)
        else:
            meta[name] = {}
    gather = _check_config(folder / "config.json", meta["config"])
    load = partial(safetensors.read, allowance=allowance, mmap=mmap, words=gather is not None)
    tensors = _read_tensors(folder, allowance, load)
    return meta, tensors if gather is None else gather(folder, tensors)


def _read_tensors(folder: Path, allowance: Allowance, load: Load) -> dict[str, Tensor]:
    """Tensors of all files of weights."""
    if (folder / "model.safetensors").exists():
        return load(inside(folder / "model.safetensors", folder))
    if (folder / INDEX).exists():
        return _read_shards(folder, allowance, load)
    found = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
    raise FormatError(
        folder,
        "",
        found=f"{shown(found[0])}, a pickle" if found else "no weights",
        expected=f"model.safetensors or {INDEX}",
        hint=SAFER if found else "",
    )


def _check_config(path: Path, config: dict[str, Any]) -> Callable[..., dict[str, Tensor]] | None:
    """What puts the tensors of quantized weights together, (path, tensors) -> tensors, None if they are
    plain; FormatError for another way, or no config at all.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(path, "architectures", found=brief(names), expected="a list of names")
    if not isinstance(config.get("model_type"), str):
        raise FormatError(path, "model_type", found=brief(config.get("model_type")), expected="a name")
    # A model of text and images keeps the configuration of its text part in an object of its own.
    for part in (config, config.get("text_config")):
        quantization = part.get("quantization_config") if isinstance(part, dict) else None
        if quantization is None:
            continue
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if not isinstance(method, str) or method not in QUANTIZED:
            raise FormatError(
                path,
                "quantization_config",
                found=f"quant_method {brief(method)}",
                expected=f"none, or {' or '.join(QUANTIZED)}",
            )
        module = QUANTIZED[method]
        return partial(module.gather, scheme=module.read_config(path, quantization))
    return None


def _read_shards(folder: Path, allowance: Allowance, load: Load) -> dict[str, Tensor]:
    """Tensors of all the files that an index names, each in the file where the index says it is."""
    index = folder / INDEX
    weight_map = strict_json.read(inside(index, folder), allowance).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(index, "weight_map", found=brief(weight_map), expected="an object of file names")
    names: dict[str, set[str]] = defaultdict(set)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            where, expected = f"weight_map, tensor {shown(name)}", "a plain name of a .safetensors file"
            raise FormatError(index, where, found=brief(shard), expected=expected)
        names[shard].add(name)
    tensors: dict[str, Tensor] = {}
    for path in all_there([folder / shard for shard in sorted(names)], folder):
        held = load(path)
        for name in held.keys() ^ names[path.name]:
            found, expected = ("it", "it elsewhere") if name in held else ("no such tensor", "it here")
            raise FormatError(path, f"tensor {shown(name)}", found=found, expected=f"{expected}, by {INDEX}")
        tensors |= held
    return tensors
