"""A model as a Hugging Face folder: config.json, safetensors, and the files of its tokenizer."""

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from .. import arch, formats, kernels, uniform
from ..arch import as_huggingface
from ..arch.as_huggingface import Checkpoint
from ..errors import EdgeqError
from ..files import compressed_tensors, safetensors_writer
from ..files.compressed_tensors import Scheme
from ..files.output import Entry, Progress, whole
from ..grid import encode as grid_codes
from ..tensor import Tensor
from ..tokenizer import as_huggingface as tokenizer_files
from .source import Source, interleaved, open_source, order
from .stream import Recoding, Stream, streams

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
INTEGERS = {"int8": "i8", "int4": "i4", "int3": "i3", "int2": "i2"}
GROUP = 64  # columns that share a scale, with fewer than 8 bits


def to_huggingface(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    outtype: str = "auto",
    *,
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
        type, and gives f16 to all others. ``"int8"``, ``"int4"``, ``"int3"`` or ``"int2"`` for linear layers
        (not the output matrix), as compressed-tensors stores them, and all others as by auto.
    group : columns of an integer layer that share a scale; None takes whole rows with 8 bits, else 64.
    symmetric : integers without zero points.
    threads, max_size, progress : as in `quantizers.quantize`.

    Returns
    -------
    The folder.

    Raises
    ------
    FormatError : when the source is unsound, or of an architecture that edgeq does not run.
    """
    if outtype not in (*DTYPES, *INTEGERS, "auto"):
        raise ValueError(f"unknown type {outtype!r}; weights there are {', '.join((*DTYPES, *INTEGERS))}")
    if group is not None and group % 32:
        raise ValueError(f"groups of {group} columns, expected a multiple of 32")
    scheme = None
    if outtype in INTEGERS:
        bits = int(outtype.removeprefix("int"))
        scheme = Scheme(bits, symmetric, group or (None if bits == 8 else GROUP))
    dst, source = Path(dst), open_source(src)
    meta = {key: v.item() if isinstance(v, np.generic) else v for key, v in source.meta.items()}
    module, plain, _ = arch.identify(meta, source.tensors, source.path)
    target = as_huggingface.checkpoint(module, plain, source.tensors, source.path)
    recodings = _recodings(source, target, outtype, scheme)
    config = target.config | {"torch_dtype": _dtype(recodings)}
    if scheme is not None:
        config["quantization_config"] = compressed_tensors.config(scheme)
    texts = tokenizer_files.files(plain, source.path)
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = plain.get(f"tokenizer.ggml.{name}_token_id")
    texts["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    encode = formats.quantize if scheme is None else partial(_encode, scheme=scheme)
    with streams(recodings, threads or kernels.cores(), source.path, encode) as made:
        entries = [entry for stream in made for entry in _entries(stream, scheme)]
        needed = sum(entry.nbytes for entry in entries) + sum(map(len, texts.values()))
        with whole(dst, nbytes=needed) as (unfinished,):
            unfinished.mkdir()
            for name, text in texts.items():
                (unfinished / name).write_bytes(text)
            safetensors_writer.write(unfinished, entries, max_size=max_size, progress=progress)
    return dst


def _recodings(source: Source, target: Checkpoint, outtype: str, scheme: Scheme | None) -> list[Recoding]:
    """What becomes of each tensor, under the folder's names."""
    recodings = []
    for name in sorted(target.names, key=order):
        tensor, rows = source.tensors[name], source.rows.get(name)
        if name in target.halves:
            back = np.argsort(interleaved(target.halves[name], tensor.shape[0]))
            rows = back if rows is None else rows[back]
        if len(tensor.shape) == 1:
            less = np.float32(target.gains_less_one and name.endswith("norm.weight"))
            tensor, rows = _vector(tensor, less, rows), None
        format = outtype if outtype in DTYPES else tensor.format if tensor.format in DTYPES else "f16"
        if scheme is not None and len(tensor.shape) == 2 and name.startswith("blk."):
            format = INTEGERS[outtype]
            if tensor.cols % (scheme.group or 32):
                raise EdgeqError(
                    f"tensor {name}: {tensor.cols} columns are no whole groups of {scheme.group or 32}. "
                    "Take groups that divide it (--group-size)"
                )
        recodings.append(Recoding(tensor._replace(name=target.names[name]), format, rows))
    return recodings


def _dtype(recodings: list[Recoding]) -> str:
    """What config.json calls the type of most weights that are no integers."""
    sizes: Counter[str] = Counter()
    for r in recodings:
        if r.format in DTYPES:
            sizes[r.format] += r.tensor.rows * r.tensor.cols
    return DTYPES[sizes.most_common(1)[0][0]]


def _encode(format: str, w: np.ndarray, importance: np.ndarray | None, scheme: Scheme) -> Tensor:
    """`formats.quantize` with the scheme's groups."""
    if format in DTYPES:
        return formats.quantize(format, w)
    grid = uniform.fit(w, scheme.bits, symmetric=scheme.symmetric, per=scheme.group or "row")
    module = formats.get(format)
    blocks = module.pack(grid_codes(w, grid).reshape(-1, module.BLOCK), grid)
    return Tensor("", format, w.shape, blocks.reshape(-1), module.parts(grid))


def _entries(stream: Stream, scheme: Scheme | None) -> list[Entry]:
    """The tensors of the folder that a stream becomes."""
    r = stream.recoding
    if r.format in DTYPES or scheme is None:
        return [Entry(r.tensor.name, r.format.upper(), r.tensor.shape, r.nbytes, stream.pieces)]
    return compressed_tensors.entries(r.tensor.name, r.tensor.shape, scheme, stream.pieces, stream.parts)


def _vector(tensor: Tensor, less: np.float32, rows: np.ndarray | None) -> Tensor:
    """A gain or bias with something taken off, in another order; f32 where it changes."""
    if not less and rows is None:
        return tensor
    w = formats.dequantize(tensor).reshape(-1)
    w = (w if rows is None else w[rows]) - less
    return tensor._replace(format="f32", data=np.ascontiguousarray(w).view(np.uint8))
