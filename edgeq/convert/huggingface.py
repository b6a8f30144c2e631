"""A model as a Hugging Face folder: config.json, safetensors, and the files of its tokenizer."""

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .. import arch, formats, kernels, uniform
from ..arch import as_huggingface
from ..arch.as_huggingface import Checkpoint
from ..errors import EdgeqError
from ..files import aqlm, awq, bitnet, bitsandbytes, compressed_tensors, eetq, gptq, hqq, safetensors_writer
from ..files.output import Entry, Progress, whole
from ..grid import Grid
from ..grid import encode as grid_codes
from ..tensor import Tensor
from ..tokenizer import as_huggingface as tokenizer_files
from .source import Source, interleaved, open_source, order, plain
from .stream import Recoding, Stream, streams

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
INTEGERS = {
    "int8": "i8",
    "int4": "i4",
    "int3": "i3",
    "int2": "i2",
    "int1": "i1",
    "nf4": "nf4",
    "ternary": "ternary",
}
LAYOUTS = {
    module.METHOD: module for module in (compressed_tensors, awq, bitnet, bitsandbytes, eetq, gptq, hqq)
}
OWN = {"nf4": "bitsandbytes", "ternary": "bitnet"}  # layouts that these have to themselves
GROUP = 64  # columns that share a scale, with fewer than 8 bits


class Target(NamedTuple):
    """What linear layers become.

    Attributes
    ----------
    layout : a module of LAYOUTS.
    format : of integers.
    symmetric, group : without zero points; columns that share a scale, None for all.
    scheme : the layout's own words for these.
    """

    layout: ModuleType
    format: str
    symmetric: bool
    group: int | None
    scheme: Any


def to_huggingface(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    outtype: str = "auto",
    *,
    layout: str | None = None,
    group: int | None = None,
    symmetric: bool = True,
    threads: int | None = None,
    max_size: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a model as a Hugging Face folder.

    Parameters
    ----------
    src : a GGUF file, or a folder of the kind that is written.
    dst : the folder, a new one; it appears whole or not at all.
    outtype : ``"f32"``, ``"f16"`` or ``"bf16"`` for all weights; ``"auto"`` keeps those that are of such a
        type, and gives f16 to all others. A name in INTEGERS, such as ``"int4"`` or ``"nf4"``, for linear
        layers (not the output matrix), and all others as by auto.
    layout : whose layout integers are stored in, a name in LAYOUTS; None takes compressed-tensors, for
        ternary bitnet, for nf4 bitsandbytes. Given with auto, layers that are integers already stay just
        these.
    group : columns of an integer layer that share a scale; None takes whole rows with 8 bits, else 64.
    symmetric : integers without zero points.
    threads, max_size, progress : as in `quantizers.quantize`.

    Returns
    -------
    The folder.

    Raises
    ------
    FormatError : when the source is unsound, or of an architecture that edgeq does not run.
    EdgeqError : when the layout does not hold such layers.
    """
    if outtype not in (*DTYPES, *INTEGERS, "auto"):
        raise ValueError(f"unknown type {outtype!r}; weights there are {', '.join((*DTYPES, *INTEGERS))}")
    if layout is not None and (layout not in LAYOUTS or outtype in DTYPES):
        raise ValueError(f"layout {layout!r}, expected one of {', '.join(LAYOUTS)}, and integers")
    if group is not None and group % 32:
        raise ValueError(f"groups of {group} columns, expected a multiple of 32")
    source, to = open_source(src), None
    if outtype in INTEGERS:
        whole_rows = outtype == "int8" and layout != "hqq" or outtype == "ternary"
        layout = layout or OWN.get(outtype, "compressed-tensors")
        to = target(layout, INTEGERS[outtype], symmetric, group or (None if whole_rows else GROUP))
    elif layout is not None:
        to = present(source, layout)
    return write(source, dst, outtype, to, threads=threads, max_size=max_size, progress=progress)


def target(layout: str, format: str, symmetric: bool, group: int | None) -> Target:
    """Such integers in a layout; EdgeqError when it holds others only."""
    module = LAYOUTS[layout]
    try:
        return Target(module, format, symmetric, group, module.scheme(format, symmetric, group))
    except ValueError as e:
        kind = f"{format}{'' if symmetric else ' with zero points'} in {'groups' if group else 'whole rows'}"
        raise EdgeqError(f"{layout} holds {e}, not {kind}") from e


def present(source: Source, layout: str) -> Target:
    """A target that keeps the integers of a source's layers as they are."""
    layers = [t for t in source.tensors.values() if t.name.startswith("blk.") and len(t.shape) == 2]
    kinds = {(t.format, _group(t)) for t in layers if t.format in INTEGERS.values()}
    if len(kinds) != 1 or any(t.format not in INTEGERS.values() for t in layers):
        found = "no integers, or of several bits or groups"
        raise EdgeqError(f"{source.path}: layers have {found}; {layout} holds one kind. Name a type")
    ordered = any(t.order is not None for t in layers)
    if ordered and layout != "gptq":
        raise EdgeqError(f"{source.path}: groups are no neighbors (act-order), which only gptq can say")
    if layout != "hqq" and any(t.parts["zero"].dtype != np.uint8 for t in layers if "zero" in t.parts):
        raise EdgeqError(f"{source.path}: zero points are no integers, which only hqq can say")
    made = target(layout, layers[0].format, not any("zero" in t.parts for t in layers), _group(layers[0]))
    if ordered:
        return made._replace(scheme=made.scheme._replace(ordered=True))
    if layout == compressed_tensors.METHOD:
        scales = [t.parts["scale"] for t in layers]
        whole = made.group is None and all(np.ptp(s) == 0 for s in scales)
        with np.errstate(over="ignore"):
            short = all((s.astype(np.float16) == s).all() for s in scales)
        return made._replace(scheme=made.scheme._replace(whole=whole, short=short))
    return made


def _group(tensor: Tensor) -> int | None:
    """Columns of a tensor that share a scale, None for all."""
    scales = tensor.parts["scale"].size // tensor.rows if "scale" in tensor.parts else 1
    return None if scales == 1 else tensor.cols // scales


def write(
    source: Source,
    dst: str | os.PathLike,
    outtype: str,
    target: Target | None = None,
    *,
    threads: int | None = None,
    max_size: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a source as `to_huggingface` does, its linear layers as the target says; without one and with
    "auto", matrices in AQLM stay so. Integers that the target asks for stay just these, and what they say of
    their inputs is written where the layout has words for it.
    """
    dst = Path(dst)
    module, meta, _ = arch.identify(plain(source.meta), source.tensors, source.path)
    checkpoint = as_huggingface.checkpoint(module, meta, source.tensors, source.path)
    told = [t.inputs for t in source.tensors.values() if t.inputs]
    if told and target is not None and target.layout is compressed_tensors:
        shifted = any(inputs.zero for inputs in told)
        target = target._replace(scheme=target.scheme._replace(inputs=told[0].share, shifted=shifted))
    recodings = _recodings(source, checkpoint, outtype, target)
    config = checkpoint.config | {"torch_dtype": _dtype(recodings)}
    if target is not None:
        config["quantization_config"] = target.layout.config(target.scheme)
    elif vectors := [r.tensor for r in recodings if r.format == "aqlm"]:
        names = [r.tensor.name for r in recodings if r.format != "aqlm" and r.tensor.name.endswith(".weight")]
        names = list(dict.fromkeys([*names, "lm_head.weight"]))
        config["quantization_config"] = aqlm.config(formats.get("aqlm").scheme(vectors[0]), names)
    texts = tokenizer_files.files(meta, source.path)
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = meta.get(f"tokenizer.ggml.{name}_token_id")
    texts["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    encode = formats.quantize if target is None else partial(_encode, target=target)
    with streams(recodings, threads or kernels.cores(), source.path, encode) as made:
        entries = [entry for stream in made for entry in _entries(stream, target)]
        needed = sum(entry.nbytes for entry in entries) + sum(map(len, texts.values()))
        with whole(dst, nbytes=needed) as (unfinished,):
            unfinished.mkdir()
            for name, text in texts.items():
                (unfinished / name).write_bytes(text)
            safetensors_writer.write(unfinished, entries, max_size=max_size, progress=progress)
    return dst


def _recodings(source: Source, checkpoint: Checkpoint, outtype: str, target: Target | None) -> list[Recoding]:
    """What becomes of each tensor, under the folder's names."""
    recodings = []
    for name in sorted(checkpoint.names, key=order):
        tensor, rows = source.tensors[name], source.rows.get(name)
        if name in checkpoint.halves:
            back = np.argsort(interleaved(checkpoint.halves[name], tensor.shape[0]))
            rows = back if rows is None else rows[back]
        if len(tensor.shape) == 1:
            less = np.float32(checkpoint.gains_less_one and name.endswith("norm.weight"))
            tensor, rows = _vector(tensor, less, rows), None
        kept = tensor.format in (*DTYPES, "aqlm")
        format = outtype if outtype in DTYPES else tensor.format if kept else "f16"
        if target is not None and len(tensor.shape) == 2 and name.startswith("blk."):
            format = target.format
            if tensor.cols % (target.group or 32):
                raise EdgeqError(
                    f"tensor {name}: {tensor.cols} columns are no whole groups of {target.group or 32}. "
                    "Take groups that divide it (--group-size)"
                )
            if format == "ternary" != tensor.format:
                tensor = _ternary(tensor)
        recodings.append(Recoding(tensor._replace(name=checkpoint.names[name]), format, rows))
    return recodings


def _dtype(recodings: list[Recoding]) -> str:
    """What config.json calls the type of most weights that are no integers."""
    sizes: Counter[str] = Counter()
    for r in recodings:
        if r.format in DTYPES:
            sizes[r.format] += r.tensor.rows * r.tensor.cols
    return DTYPES[sizes.most_common(1)[0][0]]


def _encode(format: str, w: np.ndarray, importance: np.ndarray | None, target: Target) -> Tensor:
    """`formats.quantize` with the target's groups."""
    if format in (*DTYPES, "nf4"):
        return formats.quantize(format, w)
    module = formats.get(format)
    if target.layout is hqq:
        grid = uniform.covering(w, module.BITS, target.scheme.group)
        return formats.pack(format, grid_codes(w, grid), grid)
    grid = uniform.fit(w, module.BITS, symmetric=target.symmetric, per=target.group or "row")
    if target.group is None and target.layout is not compressed_tensors:
        # scales of rows are float16 there, too, and codes are chosen for these
        parts = module.parts(grid)
        grid = uniform.grid_of(
            module.BITS, parts["scale"].astype(np.float16).astype(np.float32), parts.get("zero")
        )
    return formats.pack(format, grid_codes(w, grid), grid)


def _ternary(tensor: Tensor) -> Tensor:
    """A matrix as BitNet rounds it, with one scale, its mean magnitude."""
    w = formats.dequantize(tensor)
    scale = np.abs(w).mean(dtype=np.float64).astype(np.float32)
    grid = Grid(formats.get("ternary").LEVELS, np.full((len(w), 1), scale))
    return formats.pack("ternary", grid_codes(w, grid), grid)._replace(name=tensor.name)


def _entries(stream: Stream, target: Target | None) -> list[Entry]:
    """The tensors of the folder that a stream becomes."""
    r = stream.recoding
    if r.format == "aqlm":
        return aqlm.entries(r.tensor.name, r.tensor, r.rows, stream.pieces)
    if r.format in DTYPES or target is None:
        return [Entry(r.tensor.name, r.format.upper(), r.tensor.shape, r.nbytes, stream.pieces)]
    return target.layout.entries(r.tensor, target.scheme, stream.pieces, stream.parts)


def _vector(tensor: Tensor, less: np.float32, rows: np.ndarray | None) -> Tensor:
    """A gain or bias with something taken off, in another order; f32 where it changes."""
    if not less and rows is None:
        return tensor
    w = formats.dequantize(tensor).reshape(-1)
    w = (w if rows is None else w[rows]) - less
    return tensor._replace(format="f32", data=np.ascontiguousarray(w).view(np.uint8))
