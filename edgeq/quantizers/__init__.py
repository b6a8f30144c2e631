"""Quantizing a model: a smaller file, with a type for each tensor that its mix names.

mix         which type each tensor gets
auto        the same, from what each type costs each tensor
layerwise   methods on a whole model, which choose codes or change weights with a text at hand
gptq, obq, hqq, awq, aqlm, eetq    the algorithms
smooth, static, dynamic, ternary, binary    methods whose files are those of Hugging Face folders
integers    what these share
objective, target      what they make small, and the grids that they put weights on
"""

import importlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np

from .. import catalog, formats, kernels, uniform
from ..convert import exact, huggingface
from ..convert.source import Source, open_source, order
from ..convert.stream import Encode, Recoding, streams
from ..errors import EdgeqError, FormatError
from ..files import gguf_writer
from ..files.imatrix import Imatrix
from ..files.imatrix import read as read_imatrix
from ..files.output import Entry
from ..tensor import Tensor
from . import auto, hqq, integers, layerwise, mix
from .kept import discard as discard
from .layerwise import Calibration as Calibration

Progress = Callable[[str, int, int], None]

QUANTIZATION, FILE_TYPE = "general.quantization_version", "general.file_type"
VERSION = 2  # of ggml's quantized types


class Options(mix.Options, total=False):
    """What may be asked of a plan: besides what `mix.Options` has, two keyword arguments of `plan`."""

    allow_requantize: bool
    imatrix: str | os.PathLike | None


class Plan(NamedTuple):
    """What will be written.

    Attributes
    ----------
    source : path of the model that is read.
    meta : GGUF's keys.
    recodings : each tensor, and the format that it gets.
    """

    source: Path
    meta: dict[str, Any]
    recodings: list[Recoding]


def quantize(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    type: str,
    *,
    method: str = "rtn",
    method_options: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    layout: str | None = None,
    threads: int | None = None,
    max_size: int | None = None,
    keep: str | os.PathLike | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> list[Path]:
    """Write a model as a file of another type, as llama-quantize does, or by an algorithm.

    Parameters
    ----------
    src : a Hugging Face folder, a GGUF file, or a name of the catalog.
    dst : the GGUF file, or folder; it appears whole or not at all.
    type : ``"q4_k_m"``, or another name in ``quantizers.mix.MIXES``; ``"copy"`` keeps all types. Integers,
        such as ``"i4-g64-asym"`` (see `uniform`), for the layers of a Hugging Face folder.
    method : "gptq", "hqq", "awq", or several in turn: "awq+gptq"; "rtn" chooses each code by itself. "aqlm",
        "static", "dynamic", "ternary" and "binary" write a Hugging Face folder, of a type "copy".
    layout : of integers in a folder, see `convert.huggingface.to_huggingface`. None takes hqq for zero points
        that are no integers, which that method makes, else compressed-tensors.
    method_options : keyword arguments of the method, see ``quantizers.layerwise``.
    calibration : the text that methods look at; None lets the model make one up.
    threads : threads that compute; None takes one for each core.
    max_size : most bytes of tensors in a file; a larger model takes several, NAME-00001-of-0000N.gguf.
    keep : a folder for what gptq, awq and aqlm have made so far, from which an interrupted call goes on when
        it is made again; it is removed when the file is there.
    progress : called with (stage, done, total), in bytes.
    options : see `plan`.

    Returns
    -------
    The files that were written.

    Raises
    ------
    FormatError : when the source or the importance matrix is unsound, or GGUF cannot hold the model.
    EdgeqError : when the source is quantized and nobody allowed that, or the disk is full.
    """
    made = plan(catalog.resolve(src, progress), type, **options)
    check(made, dst, method, layout)
    look = (calibration or Calibration())._replace(threads=threads)
    keep = None if keep is None else Path(keep)
    made = layerwise.apply(method, made, look, progress, keep=keep, **(method_options or {}))
    paths = write(made, dst, layout=layout, threads=threads, max_size=max_size, progress=progress)
    if keep:
        discard(keep)
    return paths


def plan(
    src: str | os.PathLike,
    type: str,
    *,
    allow_requantize: bool = False,
    imatrix: str | os.PathLike | None = None,
    **options: Unpack[mix.Options],
) -> Plan:
    """What `quantize` would write; only headers are read.

    Parameters
    ----------
    src, type : as in `quantize`; ``"nearest"`` is copy, with integers of foreign folders in the types that
        come nearest, where copy wants them to be the same numbers.
    allow_requantize : take a source that is quantized already, and lose a second time.
    imatrix : a file with an importance matrix.
    options : see `mix.Options`.
    """
    name = type.lower()
    name = mix.ALIASES.get(name, name)
    kind = uniform.kind(name)
    given = [key for key, value in {**options, "imatrix": imatrix}.items() if value]
    if kind and given:
        raise ValueError(f"{name} is for all layers of a folder, without {', '.join(given)}")
    source = open_source(catalog.resolve(src))
    weights = None if imatrix is None else read_imatrix(imatrix)
    if name in ("copy", "nearest"):
        source = _held(source, exactly=name == "copy")
        types = {key: source.tensors[key].format for key in sorted(source.tensors, key=order)}
    elif name in mix.MIXES:
        types = mix.plan(source.meta, source.tensors, name, imatrix=weights is not None, **options)
    elif kind:
        types = integers.types(source, kind, name)
    else:
        names = [*mix.MIXES, "copy", "nearest", "i8", "i4-g64", "i4-g64-asym and other integers"]
        raise ValueError(f"unknown type {type!r}; edgeq has {', '.join(names)}")
    recodings = []
    for key, format in types.items():
        tensor = source.tensors[key]
        if format != tensor.format and tensor.format not in mix.FLOATS and not allow_requantize:
            raise EdgeqError(
                f"{source.path}: tensor {key} is {tensor.format} already, and would lose a second time as "
                f"{format}. Start from the original, or allow it (--allow-requantize)"
            )
        important = None if weights is None or format == tensor.format else _importance(weights, tensor)
        if important is None and name in mix.MIXES and _stands_in(format, mix.MIXES[name].base):
            important = np.ones((math.prod(tensor.shape[:-2]), tensor.cols), np.float32)
        recodings.append(Recoding(tensor, format, source.rows.get(key), important))
    return Plan(source.path, _metadata(source, name, types, weights), recodings)


def automatic(
    src: str | os.PathLike,
    bits: float,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Plan:
    """A plan in which each matrix has the type that a file of so many bits per weight is best spent on.

    Parameters
    ----------
    src : as in `quantize`.
    bits : per weight, of all tensors together.
    calibration : the text that shows what the inputs of matrices are; see `auto`.
    progress : called with (stage, done, total).
    options : see `plan`; types that they name are taken instead, whatever that makes of the size.
    """
    every: Options = {**options, "pure": True}
    first = plan(src, "q8_0", **every)
    choices = auto.measure(first, calibration or Calibration(), progress)
    rest = sum(r.nbytes for r in first.recodings if r.tensor.name not in choices)
    room = bits / 8 * sum(math.prod(r.tensor.shape) for r in first.recodings)
    types = auto.choose(choices, room - rest)
    sizes: Counter[str] = Counter()
    for name, type in types.items():
        sizes[type] += next(c.nbytes for c in choices[name] if c.type == type)
    most = next(name for name, m in mix.MIXES.items() if m.base == sizes.most_common(1)[0][0])
    exactly = {f"^{re.escape(name)}$": type for name, type in types.items()}
    chosen: Options = {**options, "tensor_types": {**options.get("tensor_types", {}), **exactly}}
    return plan(src, most, **chosen)


def check(plan: Plan, dst: str | os.PathLike, method: str = "rtn", layout: str | None = None) -> None:
    """EdgeqError, before any time is spent, if what a method makes of a plan cannot be written there."""
    layerwise.check(method)
    last = method.lower().rpartition("+")[2]
    if last == "hqq" and not any(map(hqq.has_offsets, layerwise.to_encode(plan).values())):
        raise EdgeqError(
            "no matrix gets a type with offsets, which are all that hqq chooses: take q4_1, i4-g64-asym"
        )
    kind = last if last in layerwise.FOLDERS else None
    for r in plan.recodings:
        kind = kind or (r.format if formats.parts(formats.get(r.format)) else None)
    if kind is None:
        if layout:
            raise EdgeqError(f"the layout {layout} is for integers in folders, such as i4-g64")
        return
    if Path(dst).suffix == ".gguf":
        raise EdgeqError(f"GGUF files have no type for {kind}: name a folder instead of {dst}")
    for r in plan.recodings:
        if r.format in mix.FLOATS or formats.parts(formats.get(r.format)):
            continue
        if r.format == r.tensor.format:
            raise EdgeqError(
                f"{plan.source}: tensor {r.tensor.name} is {r.format} already, and would lose a second time. "
                "Start from the original"
            )
        raise EdgeqError(
            f"tensor {r.tensor.name} would be {r.format}: beside {kind}, which no GGUF file holds, other "
            "weights stay as they are, floats. Take the type copy"
        )
    if layout and (named := integers.wanted(plan)):
        huggingface.target(layout, named.format, named.symmetric, named.group)
        if last == "hqq" != layout:
            raise EdgeqError(f"hqq makes zero points that are no integers, which {layout} does not hold")


def write(
    plan: Plan,
    dst: str | os.PathLike,
    *,
    layout: str | None = None,
    threads: int | None = None,
    max_size: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Carry out a plan; the parameters are those of `quantize`."""
    dst = Path(dst)
    if dst.exists() and dst.samefile(plan.source):
        raise EdgeqError(f"{dst} is the model that is read. Name another file")
    check(plan, dst, layout=layout)
    if any(formats.parts(formats.get(r.format)) for r in plan.recodings):
        return [_write_folder(plan, dst, layout, threads=threads, max_size=max_size, progress=progress)]
    with streams(plan.recodings, threads or kernels.cores(), plan.source, _encoder(plan)) as made:
        entries = [
            Entry(r.tensor.name, formats.get(r.format).GGML, r.tensor.shape, r.nbytes, pieces)
            for r, pieces, _ in made
        ]
        return gguf_writer.write(dst, plan.meta, entries, max_size=max_size, progress=progress)


def _held(source: Source, *, exactly: bool) -> Source:
    """The source with its integers in types of GGUF's; EdgeqError where these lose bits and must not."""
    tensors = dict(source.tensors)
    for key, tensor in tensors.items():
        if tensor.parts:
            held = exact.hold(tensor)
            if held.error and exactly:
                raise EdgeqError(
                    f"tensor {key}: GGUF files have no type for {tensor.format} with "
                    f"{exact.reason(tensor)}. Weights in {held.tensor.format} would be off by up to "
                    f"{held.error:.1g} of the largest: take that (nearest), or f32, which holds them all"
                )
            tensors[key] = held.tensor
    return source._replace(tensors=tensors)


def _write_folder(plan: Plan, dst: Path, layout: str | None, **options: Any) -> Path:
    """Carry out a plan with tensors that no GGUF file holds, as a Hugging Face folder; the others are floats
    and stay as they are.
    """
    source = Source(
        plan.source,
        plan.meta,
        {r.tensor.name: r.tensor for r in plan.recodings},
        {r.tensor.name: r.rows for r in plan.recodings if r.rows is not None},
    )
    vectors = any(r.format in formats.VECTORS for r in plan.recodings)
    return huggingface.write(
        source, dst, "auto", None if vectors else integers.target(plan, layout), **options
    )


def _encoder(plan: Plan) -> Encode:
    """The compiled one, where there is anything to compute: it takes a while to load."""
    if all(formats.get(r.format).BLOCK == 1 or r.format == r.tensor.format for r in plan.recodings):
        return formats.quantize
    return importlib.import_module("edgeq.kernels.encode").quantize


def _stands_in(format: str, base: str) -> bool:
    """Whether a format of few levels that rounds stands in for one whose scales are searched: then its scales
    are, too, with all columns alike. From five bits on, rounding leaves too little to pay for the search.
    """
    space, wanted = (getattr(formats.get(name), "SPACE", None) for name in (format, base))
    return bool(space and wanted and space.rounding and not wanted.rounding and len(space.levels) <= 16)


def _importance(weights: Imatrix, tensor: Tensor) -> np.ndarray | None:
    """Weights of a tensor's columns, float32 (matrices, cols), or None where none were measured."""
    values = weights.importance.get(tensor.name)
    if values is None:
        return None
    matrices = math.prod(tensor.shape[:-2])
    if values.size != matrices * tensor.cols:
        if tensor.name == "token_embd.weight":  # looked up, not multiplied with
            return None
        expected = f"{matrices * tensor.cols:,}, one for each input"
        raise FormatError(
            weights.path, f"entry {tensor.name}", found=f"{values.size:,} values", expected=expected
        )
    return values.reshape(matrices, tensor.cols)


def _metadata(source: Source, name: str, types: Mapping[str, str], weights: Imatrix | None) -> dict[str, Any]:
    """The source's keys, and what was made of it."""
    meta = {key: value for key, value in source.meta.items() if key not in (QUANTIZATION, FILE_TYPE)}
    if name not in mix.MIXES:
        sizes: Counter[str] = Counter()
        for key, format in types.items():
            sizes[format] += source.tensors[key].nbytes
        mixes = [mix.MIXES[f].file_type for f, _ in sizes.most_common() if f in mix.MIXES]
        file_type = source.meta.get(FILE_TYPE, mixes[0] if mixes else 0)
    else:
        file_type = mix.MIXES[name].file_type
        meta = {key: value for key, value in meta.items() if not key.startswith("quantize.imatrix.")}
    meta |= {QUANTIZATION: VERSION, FILE_TYPE: file_type}
    if weights is not None:
        meta["quantize.imatrix.file"] = str(weights.path)
        if weights.datasets:
            meta["quantize.imatrix.dataset"] = weights.datasets[0]
        meta["quantize.imatrix.entries_count"] = len(weights.importance)
        if weights.chunks > 0:
            meta["quantize.imatrix.chunks_count"] = weights.chunks
    return meta
