#!/usr/bin/env python3
"""Make a model in f16 of SmolLM2's Q4_1 file, whose weights lie on no grid.

    python tools/make_reference.py OUT.gguf [MODEL]

To tell what quantizing costs one begins with full precision. Where only a quantized file is at hand, its
unpacked weights are a poor stand-in: they lie on that file's grid, which a quantizer with the same grid finds
again. Here channels are multiplied by a random factor in one matrix and divided by it in the next, which
leaves what the model computes as it was, but for float16's rounding:

    gain j of a norm *= s_j      columns j of the matrices behind it /= s_j
    rows of v *= t               columns of o /= t, the same for all query heads of a group
    rows of up *= u              columns of down /= u

The same bytes every time. MODEL is a llama file without biases; smollm2 if not given.
"""

import argparse
from pathlib import Path

import numpy as np

from edgeq import catalog, files, formats
from edgeq.train import merge

SEED, SPREAD = 20240918, 0.25  # factors are between exp(-SPREAD) and exp(SPREAD)


def main() -> None:
    """Write OUT."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("model", nargs="?", default="smollm2")
    a = parser.parse_args()

    path = catalog.resolve(a.model)
    meta, tensors = files.read(path)
    heads, kv_heads = (meta[f"llama.attention.{key}"] for key in ("head_count", "head_count_kv"))
    w = {name: formats.dequantize(t).reshape(t.shape).astype(np.float64) for name, t in tensors.items()}
    rng = np.random.default_rng(SEED)

    def factors(count: int) -> np.ndarray:
        return np.exp(rng.uniform(-SPREAD, SPREAD, count))

    for layer in range(meta["llama.block_count"]):

        def of(name: str, layer: int = layer) -> np.ndarray:
            return w[f"blk.{layer}.{name}.weight"]

        before, behind = factors(of("attn_norm").size), factors(of("ffn_norm").size)
        inner, values = factors(len(of("ffn_up"))), factors(len(of("attn_v")))
        of("attn_norm")[:] *= before
        of("ffn_norm")[:] *= behind
        for name in ("attn_q", "attn_k", "attn_v"):
            of(name)[:] /= before
        of("attn_v")[:] *= values[:, None]
        of("attn_output")[:] /= values.reshape(kv_heads, -1).repeat(heads // kv_heads, axis=0).reshape(-1)
        for name in ("ffn_gate", "ffn_up"):
            of(name)[:] /= behind
        of("ffn_up")[:] *= inner[:, None]
        of("ffn_down")[:] /= inner
    made = {}
    for name, weights in w.items():
        half = weights.astype(np.float16)
        made[name] = (
            formats.quantize("f16", half)._replace(name=name)
            if half.ndim > 1
            else merge.float_tensor(name, half)
        )
    merge.write(path, made, {}, a.out)


if __name__ == "__main__":
    main()
