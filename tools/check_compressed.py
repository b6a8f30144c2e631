#!/usr/bin/env python3
"""Let Transformers read edgeq's int8 and int4 folders, and compare its logits with edgeq's exact path.

    python tools/check_compressed.py MODEL

where torch, transformers, compressed-tensors and edgeq's own requirements except Numba are installed. MODEL
is a GGUF file or a Hugging Face folder.

Transformers 5.23 does not load int4 with zero points: it expects them unpacked, where compressed-tensors
0.20 packs them, and so refuses what that library itself writes. Nor does it know 2 and 3 bits. edgeq reads
all of those.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from edgeq import arch, files  # noqa: E402
from edgeq.convert.huggingface import to_huggingface  # noqa: E402

KINDS = (("int8", True), ("int8", False), ("int4", True))  # type, symmetric
IDS = np.random.default_rng(0).integers(0, 1000, 40).tolist()


def main() -> None:
    """Print how far the logits of the two are from each other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    for outtype, symmetric in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = to_huggingface(args.model, Path(scratch) / "model", outtype, symmetric=symmetric)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            with torch.no_grad():
                expected = theirs(torch.tensor([IDS])).logits[0].numpy()
            ours = arch.load(*files.read(folder), backend="numpy")
            logits = ours(IDS, ours.new_cache(len(IDS)), "all")
        kind = f"{outtype}, {'' if symmetric else 'a'}symmetric"
        print(f"{kind}: logits within {np.abs(logits - expected).max() / expected.std():.1e} of their spread")


if __name__ == "__main__":
    main()
