#!/usr/bin/env python3
"""Let the libraries decode folders that edgeq wrote in their layouts, and compare all weights.

    PYTHONPATH=hqq:AutoAWQ:GPTQModel python tools/check_foreign.py MODEL

where MODEL is a GGUF file or a Hugging Face folder; see tools/make_foreign_goldens.py for what must be there,
besides edgeq's own requirements. BitNet's folder is loaded by Transformers whole; it rounds inputs to 8 bits,
which edgeq's exact path does not.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from hqq.core.quantize import HQQLinear
from make_foreign_goldens import awq_modules
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from edgeq import arch, files, formats  # noqa: E402
from edgeq.convert.huggingface import to_huggingface  # noqa: E402

GROUP = 32
IDS = list(range(20))
Decode = Callable[[dict[str, torch.Tensor], int], torch.Tensor]


def gptq(layer: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Weights (rows, cols), float32."""
    rows, cols = layer["scales"].shape[1], layer["g_idx"].shape[0]
    linear = TorchLinear(bits, GROUP, False, False, cols, rows)
    for name, value in layer.items():
        linear.register_buffer(name, value)
    linear.post_init()
    convert_gptq_v1_to_v2_format_module(linear, bits, torch.int32)
    linear.scales = linear.scales.float()
    return linear.dequantize_weight().T


def awq(layer: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Weights (rows, cols), float32."""
    decode = awq_modules()[1].dequantize_gemm
    return decode(layer["qweight"], layer["qzeros"], layer["scales"].float(), bits, GROUP).T


def hqq(layer: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Weights (rows, cols), float32."""
    linear = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
    linear.load_state_dict(dict(layer))
    linear.meta["compute_dtype"] = torch.float32
    linear.meta |= {key: linear.meta[key].float() for key in ("scale", "zero")}
    return linear.dequantize()


def main() -> None:
    """Print the largest difference of weights, and of logits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    kinds: list[tuple[str, str, int, Decode]] = [("awq", "qweight", 4, awq)]
    kinds += [("gptq", "qweight", bits, gptq) for bits in (2, 3, 4, 8)]
    kinds += [("hqq", "W_q", bits, hqq) for bits in (2, 3, 4, 8)]
    for layout, mark, bits, decode in kinds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = to_huggingface(
                args.model, Path(scratch) / "m", f"int{bits}", layout=layout, group=GROUP, symmetric=False
            )
            stored, ours = load_file(folder / "model.safetensors"), files.read(folder)[1]
            worst, count = 0.0, 0
            for name in stored:
                if not name.endswith(f".{mark}"):
                    continue
                base = name.removesuffix(mark)
                layer = {k.removeprefix(base): v for k, v in stored.items() if k.startswith(base)}
                w = formats.dequantize(ours[f"{base}weight"])
                worst = max(worst, float(np.abs(decode(layer, bits).numpy() - w).max() / np.abs(w).max()))
                count += 1
        print(f"{layout}, {bits} bits: weights of {count} layers within {worst:.1e} of the largest")
    with tempfile.TemporaryDirectory() as scratch:
        folder = to_huggingface(args.model, Path(scratch) / "m", "ternary")
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected = theirs(torch.tensor([IDS])).logits[0].numpy()
        model = arch.load(*files.read(folder), backend="numpy")
        logits = model(IDS, model.new_cache(len(IDS)), "all")
        print(f"bitnet: logits within {np.abs(logits - expected).max() / expected.std():.1e} of their spread")


if __name__ == "__main__":
    main()
