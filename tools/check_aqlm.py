#!/usr/bin/env python3
"""Let the AQLM library and Transformers read what edgeq writes, and edgeq what the library writes.

    python tools/check_aqlm.py FOLDER

where torch, transformers, accelerate, aqlm, scipy and edgeq's own requirements are installed. FOLDER is
what ``edgeq quantize MODEL FOLDER --method aqlm`` has made. Printed are the largest differences

    layers        of weights that the library and edgeq decode from the folder
    logits        of Transformers and of edgeq's exact path, as a part of their spread
    checkpoints   of weights that edgeq reads from layers that the library has packed
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

os.environ["NUMBA_NUM_THREADS"] = "1"  # more threads would add to the same sums at once in aqlm's kernel

import torch
from aqlm.utils import _dequantize_weight, get_int_dtype, pack_int_data, unpack_int_data
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from edgeq import arch, files, formats  # noqa: E402

IDS = np.random.default_rng(0).integers(0, 1000, 40).tolist()
SCHEMES = ((1, 16, 8), (2, 8, 8), (8, 8, 32), (1, 12, 8))  # codebooks, bits, group


def decoded(tensors: dict[str, torch.Tensor], base: str, bits: int) -> np.ndarray:
    """A layer's weights, by the library."""
    codes = unpack_int_data(tensors[f"{base}.codes"], bits)
    parts = (tensors[f"{base}.{role}"].float() for role in ("codebooks", "scales"))
    return _dequantize_weight(codes, *parts).numpy()


def layers(folder: Path) -> float:
    """What edgeq wrote, read by both."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    theirs, ours = load_file(folder / "model.safetensors"), files.read(folder)[1]
    worst = 0.0
    for name in theirs:
        if name.endswith(".codes"):
            base = name.removesuffix(".codes")
            w = decoded(theirs, base, config["nbits_per_codebook"])
            worst = max(worst, np.abs(w - formats.dequantize(ours[f"{base}.weight"])).max())
    return worst


def logits(folder: Path) -> float:
    """Transformers' and edgeq's."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0].numpy()
    ours = arch.load(*files.read(folder), backend="numpy")
    found = ours(IDS, ours.new_cache(len(IDS)), "all")
    return float(np.abs(found - expected).max() / expected.std())


def checkpoints(scheme: tuple[int, int, int]) -> float:
    """A layer that the library has packed, read by edgeq."""
    count, bits, group = scheme
    made = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, (64, 12, count), generator=made)
    packed = pack_int_data(codes, bits)
    assert packed.dtype == get_int_dtype(bits)
    tensors = {
        "a.codes": packed,
        "a.codebooks": torch.randn(count, 1 << bits, 1, group, generator=made).half(),
        "a.scales": torch.rand(64, 1, 1, 1, generator=made).half(),
    }
    quantized = {
        "quant_method": "aqlm",
        "in_group_size": group,
        "out_group_size": 1,
        "num_codebooks": count,
        "nbits_per_codebook": bits,
        "linear_weights_not_to_quantize": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        save_file(tensors, Path(scratch) / "model.safetensors")
        config = {"model_type": "llama", "quantization_config": quantized}
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        ours = formats.dequantize(files.read(scratch)[1]["a.weight"])
    return float(np.abs(ours - decoded(tensors, "a", bits)).max())


def main() -> None:
    """Print how far the two are from each other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for count, bits, group in SCHEMES:
        print(f"{count}x{bits} of groups of {group}: weights within {checkpoints((count, bits, group)):.1e}")
    print(f"{folder.name}: weights within {layers(folder):.1e}")
    print(f"{folder.name}: logits within {logits(folder):.1e} of their spread")


if __name__ == "__main__":
    main()
