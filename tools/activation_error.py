#!/usr/bin/env python3
"""What rounding the activations of a model's matrix products costs, with everything else exact.

    python tools/activation_error.py MODEL.gguf GOLDEN.json

GOLDEN.json holds, for each prompt, token ids, the negative log-likelihood of each token and the best next
tokens, as Transformers computes them in float32 on the dequantized weights. The exact NumPy backend runs the
model; only what goes into its products is rounded, to blocks of 32, 16 or 8 numbers with a scale. Prints a
Markdown table.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgeq import arch, files
from edgeq.kernels import numpy_backend

Rounding = Callable[[np.ndarray], np.ndarray]


def rounded(block: int, limit: int) -> Rounding:
    """Rounding of x (n, cols) to integers up to `limit` times a scale for each block."""

    def apply(x: np.ndarray) -> np.ndarray:
        blocks = x.reshape(len(x), -1, block)
        scale = np.abs(blocks).max(axis=2, keepdims=True) / limit
        scale[scale == 0] = 1
        return (np.rint(blocks / scale) * scale).astype(np.float32).reshape(x.shape)

    return apply


def error(model: arch.Model, cases: list[dict]) -> tuple[np.ndarray, int]:
    """|ΔNLL| of every token, and the number of prompts whose best next token is right."""
    differences, right = [], 0
    for case in cases:
        ids = case["ids"]
        logits = model(ids, model.new_cache(len(ids)), "all").astype(np.float64)
        top = logits.max(axis=1)
        nll = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
        nll = nll[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]
        differences.append(np.abs(nll - case["nll"]))
        right += int(logits[-1].argmax() == case["top_ids"][0])
    return np.concatenate(differences), right


def main(path: str, golden: str) -> None:
    """Print the table."""
    cases = json.loads(Path(golden).read_text())["cases"]
    model = arch.load(*files.read(path), backend="numpy", path=path)
    exact = numpy_backend.Linear.__call__
    print("| activations | mean \\|ΔNLL\\| | largest | same top token |\n|---|---|---|---|")
    for name, apply in (
        ("float32", lambda x: x),
        ("int8, block 32", rounded(32, 127)),
        ("int8, block 16", rounded(16, 127)),
        ("int8, block 8", rounded(8, 127)),
        ("int16, block 32", rounded(32, 127 * 256)),
    ):
        numpy_backend.Linear.__call__ = lambda self, x, apply=apply: exact(self, apply(x))
        differences, right = error(model, cases)
        print(
            f"| {name} | {differences.mean():.4f} | {differences.max():.3f} | {right} / {len(cases)} |",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
