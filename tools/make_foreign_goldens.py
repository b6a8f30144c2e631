"""Write tests/golden/foreign: one small layer in each layout, packed and decoded by the libraries that own
it.

    PYTHONPATH=hqq:AutoAWQ:GPTQModel python tools/make_foreign_goldens.py

needs torch, transformers, compressed-tensors, bitsandbytes, and the sources of hqq 0.2.8, AutoAWQ 0.2.9
and GPTQModel 7.7, which need no GPU for this. Each file holds the tensors of a layer "a", its weights as the
library decodes them, "expected.weight", and the quantization_config.
"""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file
from transformers.integrations import bitnet

OUT = Path(__file__).parent.parent / "tests" / "golden" / "foreign"
ROWS, COLS, GROUP = 32, 64, 32


def main() -> None:
    torch.manual_seed(0)
    for bits in (2, 3, 4, 8):
        gptq(f"gptq-{bits}-sym", bits, symmetric=True)
        gptq(f"gptq-{bits}-asym", bits, symmetric=False)
    gptq("gptq-4-v2", 4, symmetric=False, v2=True)
    gptq("gptq-4-order", 4, symmetric=False, ordered=True)
    gptq("gptq-3-order", 3, symmetric=True, ordered=True)
    awq("awq-4")
    for bits in (8, 4, 3, 2, 1):
        hqq(f"hqq-{bits}", bits, axis=1)
    for bits in (4, 3):
        hqq(f"hqq-{bits}-axis-0", bits, axis=0)
    ternary("bitnet-bitlinear", "bitlinear")
    ternary("bitnet-autobitlinear", "autobitlinear")
    for bits in (4, 3):
        pack_quantized(f"compressed-tensors-{bits}-asym", bits)
    normal_floats("bitsandbytes-nf4", COLS, nested=False)
    normal_floats("bitsandbytes-nf4-nested", 10 * COLS, nested=True)


def save(name: str, tensors: dict, expected: torch.Tensor, quantization: dict) -> None:
    """Write a golden."""
    tensors = {f"a.{key}": value.contiguous() for key, value in tensors.items()}
    tensors["expected.weight"] = expected.detach().float().contiguous()
    save_file(tensors, OUT / f"{name}.safetensors", {"quantization_config": json.dumps(quantization)})


def grid(w: torch.Tensor, bits: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, as float16 holds them, and zero points (rows, groups) of groups of neighbors."""
    x, last = w.reshape(len(w), -1, GROUP), 2**bits - 1
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if symmetric:
        scale = (2 * x.abs().amax(-1) / last).half().float()
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = ((high - low) / last).half().float()
    # not 0: the first layout cannot tell it from what its neighbor borrowed
    return scale, (-low / scale).round().clamp(1, last)


def gptq(name: str, bits: int, *, symmetric: bool, v2: bool = False, ordered: bool = False) -> None:
    """By GPTQModel."""
    linear = torch.nn.Linear(COLS, ROWS, bias=False)
    group = torch.arange(COLS, dtype=torch.int32) // GROUP
    if ordered:
        group = group[torch.randperm(COLS)]
    w = linear.weight.data[:, torch.argsort(group, stable=True)]
    scale, zero = grid(w, bits, symmetric=symmetric)
    layer = TorchLinear(bits, GROUP, symmetric, ordered, COLS, ROWS)
    layer.pack_original(linear, scale, zero, group)
    layer.post_init()
    half = layer.scales
    layer.scales = half.float()  # in which it then computes
    expected, layer.scales = layer.dequantize_weight().T.clone(), half
    if not v2:
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits))
    tensors = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "sym": symmetric,
        "desc_act": ordered,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }
    save(name, tensors, expected, quantization)


def awq(name: str) -> None:
    """By AutoAWQ."""
    gemm, utils = awq_modules()
    linear = torch.nn.Linear(COLS, ROWS, bias=False)
    scale, zero = grid(linear.weight.data, 4, symmetric=False)
    layer = gemm.WQLinear_GEMM.from_linear(linear, 4, GROUP, False, scale.T.contiguous(), zero.T.contiguous())
    tensors = {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales")}
    expected = utils.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP).T
    quantization = {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    save(name, tensors, expected, {"quant_method": "awq"} | quantization)


@cache
def awq_modules() -> tuple[ModuleType, ModuleType]:
    """AutoAWQ's modules.linear.gemm and utils.packing_utils, alone: the rest needs older libraries."""
    spec = importlib.util.find_spec("awq")
    folder = Path(spec.submodule_search_locations[0])
    utils = _load(folder / "utils" / "packing_utils.py", "awq.utils.packing_utils")
    for missing in ("awq", "awq.utils", "awq.utils.module", "awq.utils.utils"):
        sys.modules[missing] = ModuleType(missing)
    sys.modules["awq.utils.module"].try_import = lambda _: (None, "")
    sys.modules["awq.utils.utils"].get_best_device = lambda: "cpu"
    return _load(folder / "modules" / "linear" / "gemm.py", "awq.modules.linear.gemm"), utils


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hqq(name: str, bits: int, *, axis: int) -> None:
    """By hqq."""
    linear = torch.nn.Linear(COLS, ROWS, bias=False)
    settings = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)
    layer = HQQLinear(linear, settings, compute_dtype=torch.float16, device="cpu")
    tensors = {key: value for key, value in layer.state_dict().items() if value is not None}
    layer.meta["compute_dtype"] = torch.float32
    layer.meta |= {key: layer.meta[key].float() for key in ("scale", "zero")}
    save(name, tensors, layer.dequantize(), {"quant_method": "hqq", "quant_config": settings})


def ternary(name: str, kind: str) -> None:
    """By Transformers."""
    codes, scale = torch.randint(-1, 2, (ROWS, COLS)).float(), torch.tensor([0.37])
    tensors = {"weight": bitnet.pack_weights(codes.clone()), "weight_scale": scale}
    w = bitnet.unpack_weights(tensors["weight"], torch.float32)
    expected = w / scale if kind == "bitlinear" else w * scale
    save(
        name,
        tensors,
        expected,
        {"quant_method": "bitnet", "linear_class": kind, "quantization_mode": "offline"},
    )


def normal_floats(name: str, cols: int, *, nested: bool) -> None:
    """By bitsandbytes, in runs of 64 weights."""
    linear = torch.nn.Linear(cols, ROWS, bias=False)
    codes, state = quantize_4bit(
        linear.weight.data, blocksize=64, compress_statistics=nested, quant_type="nf4"
    )
    tensors = {"weight": codes} | {f"weight.{key}": v for key, v in state.as_dict(packed=True).items()}
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": nested}
    save(name, tensors, dequantize_4bit(codes, state), {"quant_method": "bitsandbytes"} | quantization)


def pack_quantized(name: str, bits: int) -> None:
    """By compressed-tensors."""
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    w = torch.randn(ROWS, COLS)
    scale, zero = grid(w, bits, symmetric=False)
    plain = {"weight": w, "weight_scale": scale, "weight_zero_point": (zero - 2 ** (bits - 1)).to(torch.int8)}
    tensors = PackedQuantizationCompressor.compress(plain, scheme)
    expected = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    save(name, tensors, expected, quantization)


if __name__ == "__main__":
    main()
