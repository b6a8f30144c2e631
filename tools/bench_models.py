#!/usr/bin/env python3
"""Models to measure speed with, made when they are first wanted and kept in edgeq's cache.

    python tools/bench_models.py                   what there is
    python tools/bench_models.py llama-1b-q4_0     makes it, and prints its path

SmolLM2 in other formats is the catalog's file, dequantized and quantized again by gguf-py: good enough to
measure speed. The Llama of a billion weights has random ones, and SmolLM2's vocabulary. Each matrix has the
type that llama-quantize chooses for a file of that kind whose embedding is the head, too. Needs gguf-py:
pip install "edgeq[test]".
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    ReaderField,
    ReaderTensor,
)
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from edgeq import catalog
from edgeq.paths import cache_dir


class Shape(NamedTuple):
    """Sizes of a Llama."""

    dim: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int


BILLION = Shape(dim=2048, layers=16, ffn=8192, heads=32, kv_heads=8)


class Kind(NamedTuple):
    """A kind of file: its number in GGUF, and the type of most of its matrices."""

    file_type: LlamaFileType
    most: Type


class Matrix(NamedTuple):
    """A tensor to be written: its bytes, or its numbers if they are float32, are made when they are due."""

    name: str
    size: tuple[int, ...]
    type: Type
    make: Callable[[], np.ndarray]


KINDS = {
    "q4_0": Kind(LlamaFileType.MOSTLY_Q4_0, Type.Q4_0),
    "q4_k_m": Kind(LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
    "q8_0": Kind(LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    "tq2_0": Kind(LlamaFileType.MOSTLY_TQ2_0, Type.TQ2_0),
}
# where a block has float16 numbers, in proportions that let random weights scatter around 0
HALVES = {
    Type.Q4_0: {0: 1.0},
    Type.Q8_0: {0: 1.0},
    Type.Q4_K: {0: 1.0, 2: 7.5},
    Type.Q6_K: {208: 1.0},
    Type.TQ2_0: {64: 1.0},
}
DEVIATION = 0.02  # of random weights


def main(names: list[str]) -> None:
    """List the models, or make some."""
    for name in names or MODELS:
        print(resolve(name) if names else name)


def resolve(name: str) -> Path:
    """The file of one of these models, made if it is not there, or of what the catalog has by that name."""
    if name not in MODELS:
        return catalog.resolve(name)
    path = cache_dir("bench") / f"{name}.gguf"
    if not path.exists():
        print(f"making {path} ...", file=sys.stderr, flush=True)
        MODELS[name](catalog.resolve("smollm2"), path)
    return path


def requantized(kind: str, source: Path, path: Path) -> None:
    """Write the model of a GGUF file in another kind."""
    reader = GGUFReader(source)
    layers, matrices = reader.fields["llama.block_count"].contents(), []
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in tensor.shape[::-1])
        wanted = chosen_type(KINDS[kind], tensor.name, shape, layers)
        matrices.append(Matrix(tensor.name, shape, wanted, partial(encoded, tensor, wanted)))
    own = ("GGUF.", "general.architecture", "general.file_type")  # the writer's part
    write(
        path, KINDS[kind], [f for name, f in reader.fields.items() if not name.startswith(own)], {}, matrices
    )


def encoded(tensor: ReaderTensor, wanted: Type) -> np.ndarray:
    """A tensor's bytes in another type."""
    if tensor.tensor_type == wanted:
        return tensor.data
    return quantize(dequantize(tensor.data, tensor.tensor_type), wanted)


def random_llama(kind: str, source: Path, path: Path, shape: Shape = BILLION) -> None:
    """Write a Llama with random weights, and the vocabulary of a GGUF file."""
    reader, rng = GGUFReader(source), np.random.default_rng(0)
    vocabulary = [f for name, f in reader.fields.items() if name.startswith("tokenizer.")]
    tokens, dim = len(reader.fields["tokenizer.ggml.tokens"].data), shape.dim
    kv_dim = dim // shape.heads * shape.kv_heads
    layer = {
        "attn_norm": (dim,),
        "attn_q": (dim, dim),
        "attn_k": (kv_dim, dim),
        "attn_v": (kv_dim, dim),
        "attn_output": (dim, dim),
        "ffn_norm": (dim,),
        "ffn_gate": (shape.ffn, dim),
        "ffn_up": (shape.ffn, dim),
        "ffn_down": (dim, shape.ffn),
    }
    sizes: dict[str, tuple[int, ...]] = {"token_embd.weight": (tokens, dim), "output_norm.weight": (dim,)}
    sizes |= {f"blk.{i}.{name}.weight": size for i in range(shape.layers) for name, size in layer.items()}
    matrices = []
    for name, size in sizes.items():
        wanted = chosen_type(KINDS[kind], name, size, shape.layers)
        matrices.append(Matrix(name, size, wanted, partial(random_data, size, wanted, rng)))
    numbers = {
        "vocab_size": tokens,
        "context_length": 8192,
        "embedding_length": dim,
        "block_count": shape.layers,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": dim // shape.heads,
        "rope.freq_base": 500000.0,
    }
    write(path, KINDS[kind], vocabulary, numbers, matrices)


def random_data(size: tuple[int, ...], kind: Type, rng: np.random.Generator) -> np.ndarray:
    """A random matrix, uint8 (rows, bytes of a row); the weights of a norm are float32 ones."""
    if kind is Type.F32:
        return np.ones(size, np.float32)
    block, nbytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (size[0] * size[1] // block, nbytes), np.uint8)
    if kind is Type.TQ2_0:  # a weight has three codes, not four
        blocks[:, :64] &= ~(blocks[:, :64] >> 1 & 0x55)

    def scale(blocks: np.ndarray, factor: float) -> None:
        for at, number in HALVES[kind].items():
            blocks[:, at : at + 2] = np.array([number * factor], "<f2").view(np.uint8)

    sample = blocks[:256].copy()
    scale(sample, 1.0)
    scale(blocks, DEVIATION / float(dequantize(sample, kind).std()))
    return blocks.reshape(size[0], -1)


def chosen_type(kind: Kind, name: str, size: tuple[int, ...], layers: int) -> Type:
    """What llama-quantize makes of a tensor, in a file whose embedding is the head, too."""
    if len(size) == 1:
        return Type.F32
    part = name.split(".")[-2]
    chosen = kind.most
    if part == "token_embd" and chosen is not Type.Q8_0:
        chosen = Type.Q6_K
    if chosen is Type.Q4_K and part in ("attn_v", "ffn_down"):
        eighth, i = layers // 8, int(name.split(".")[1])
        if i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2:
            chosen = Type.Q6_K
    if chosen is Type.Q6_K and size[-1] % GGML_QUANT_SIZES[chosen][0]:
        chosen = Type.Q8_0
    return chosen


def write(
    path: Path,
    kind: Kind,
    copied: Iterable[ReaderField],
    numbers: Mapping[str, int | float],
    matrices: Iterable[Matrix],
) -> None:
    """Write a GGUF file, one matrix in memory at a time; it has its name when it is complete."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = GGUFWriter(part, "llama")
    writer.add_file_type(kind.file_type)
    for field in copied:
        of = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of)
    for name, number in numbers.items():
        add = writer.add_uint32 if isinstance(number, int) else writer.add_float32
        add(f"llama.{name}", number)
    for m in matrices:
        block, nbytes = GGML_QUANT_SIZES[m.type]
        writer.add_tensor_info(
            m.name, m.size, np.dtype(np.float32), math.prod(m.size) // block * nbytes, m.type
        )
    try:
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for m in matrices:
                writer.write_tensor_data(m.make())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


MODELS: dict[str, Callable[[Path, Path], None]] = {
    **{f"smollm2-{kind}": partial(requantized, kind) for kind in ("q4_0", "q8_0")},
    **{f"llama-1b-{kind}": partial(random_llama, kind) for kind in KINDS},
}


if __name__ == "__main__":
    main(sys.argv[1:])
