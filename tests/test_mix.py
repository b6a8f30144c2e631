"""The types that mixes give to tensors are those of llama-quantize (see tools/make_mix_goldens.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgeq import files, formats
from edgeq.quantizers import mix
from edgeq.tensor import Tensor

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mixes.json").read_text())
NOTHING = np.zeros(0, np.uint8)


def model(arch, vocab, dim, ffn, layers, heads, kv_heads, head_dim, own_output, experts, **_):
    """Metadata and tensors without data of a model of these sizes."""
    meta = {"general.architecture": arch, f"{arch}.block_count": layers}
    meta |= {f"{arch}.attention.head_count": heads, f"{arch}.attention.head_count_kv": kv_heads}
    shapes = {"token_embd": (vocab, dim), "output_norm": (dim,)}
    if own_output:
        shapes["output"] = (vocab, dim)
    gated, down = {"ffn_gate": (ffn, dim), "ffn_up": (ffn, dim)}, {"ffn_down": (dim, ffn)}
    layer = {"attn_q": (heads * head_dim, dim), "attn_k": (kv_heads * head_dim, dim)}
    layer |= {"attn_v": (kv_heads * head_dim, dim), "attn_output": (dim, heads * head_dim)}
    layer |= {"attn_norm": (dim,), "ffn_norm": (dim,)}
    if experts:
        meta[f"{arch}.expert_count"] = experts
        layer |= {f"{name}_exps": (experts, *shape) for name, shape in (gated | down).items()}
        layer["ffn_gate_inp"] = (experts, dim)
    else:
        layer |= gated | down
    if arch in ("gemma3", "qwen3"):
        layer |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
    if arch == "gemma3":
        layer |= {"post_attention_norm": (dim,), "post_ffw_norm": (dim,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()}
    if arch == "qwen2":
        shapes |= {f"blk.{i}.attn_{x}.bias": layer[f"attn_{x}"][:1] for i in range(layers) for x in "qkv"}
    tensors = {n: Tensor(n, "f16" if len(s) > 1 else "f32", s, NOTHING) for n, s in shapes.items()}
    return meta, tensors


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_types_are_those_of_llama_quantize(name):
    golden = GOLDEN["models"][name]
    meta, tensors = model(**golden)
    for label, rows in golden["mixes"].items():
        for options, row in zip(GOLDEN["options"], rows, strict=False):
            if "tensor_types" in options and label in ("f16", "bf16"):  # it does not heed them
                continue
            types = mix.plan(meta, tensors, label, **options)
            expected = [GOLDEN["letters"][letter] for letter in golden["rows"][row]]
            for (tensor, found), theirs in zip(types.items(), expected, strict=True):
                if tensors[tensor].cols % formats.get(theirs).BLOCK:  # it would stop there
                    theirs = mix.fitting(theirs, tensors[tensor].cols)
                assert found == theirs, (label, options, tensor)


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_the_shapes_are_those_of_the_models(name, request):
    golden = GOLDEN["models"][name]
    meta, tensors = model(**golden)
    real_meta, real = files.read(request.getfixturevalue(f"{name.partition('-')[0]}_path"))
    assert {n: t.shape for n, t in real.items()} == {n: t.shape for n, t in tensors.items()}
    for label in golden["mixes"]:
        assert mix.plan(real_meta, real, label) == mix.plan(meta, tensors, label)


def test_every_mix_was_asked_for():
    assert set(mix.MIXES) == {*GOLDEN["models"]["smollm2"]["mixes"], "f32"}
