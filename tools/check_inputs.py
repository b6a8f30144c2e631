#!/usr/bin/env python3
"""Compare the logits of folders whose inputs have 8 bits with those that compressed-tensors makes of them.

    python tools/check_inputs.py FOLDER...        needs torch, transformers and compressed-tensors

Written by `edgeq quantize SRC FOLDER --method static`, or by any other. Static scales give the same to
float32's precision (compressed-tensors 0.20: 1.4e-6 of logits up to 7.8). Dynamic ones differ there in what
the largest number becomes, 127.5 and then 127, so each folder is also run with scales that are made so.
"""

import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from edgeq import arch, files, inputs

IDS = list(range(5, 37))


def logits(folder: str) -> np.ndarray:
    """Of the NumPy backend."""
    model = arch.load(*files.read(folder), backend="numpy", path=folder)
    return model(IDS, model.new_cache(len(IDS)), "all")


def theirs(
    encode: Callable, largest: float, x: np.ndarray, kind: inputs.Inputs
) -> tuple[np.ndarray, np.ndarray]:
    """`inputs.encode` with dynamic scales of max|x| / largest."""
    if kind.share == "tensor":
        return encode(x, kind)
    size = inputs.BLOCK if kind.share == "block" else x.shape[1]
    groups = x.reshape(len(x), -1, size)
    scale = np.abs(groups).max(axis=2) / np.float32(largest)
    return np.clip(np.rint(groups / scale[:, :, None]), -128, 127).reshape(x.shape), scale


def main(folders: list[str]) -> None:
    """Print the largest differences."""
    plain = inputs.encode
    print("| folder | largest logit | difference | with their dynamic scales |\n|---|---:|---:|---:|")
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            want = model(torch.tensor([IDS])).logits[0].numpy()
        found = []
        for largest in (127, 127.5):
            inputs.encode = partial(theirs, plain, largest)
            found.append(np.abs(logits(folder) - want).max())
        print(f"| {folder} | {np.abs(want).max():.2f} | {found[0]:.1e} | {found[1]:.1e} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
