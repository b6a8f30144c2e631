#!/usr/bin/env python3
"""Ask llama.cpp which type its mixes give to each tensor; write tests/golden/mixes.json.

    python tools/make_mix_goldens.py

needs llama-cpp-python and gguf, and no weights: the models below are files of the right shapes with holes for
data, and llama_model_quantize only plans (dry_run). A row has one letter a tensor, in llama.cpp's order;
"letters" says which type a letter stands for, and "mixes" which row is that of each of the "options".
"""

import ctypes
import json
import re
import tempfile
from pathlib import Path

import gguf
import llama_cpp

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "mixes.json"
LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\S+), (?:.*\((\S+)\))?")

NAMES = """
f16 bf16 q8_0 q6_k q5_k_m q5_k_s q4_k_m q4_k_s q3_k_l q3_k_m q3_k_s q2_k iq4_nl iq4_xs q5_1 q5_0 q4_1 q4_0
tq1_0 tq2_0 mxfp4_moe
"""
MIXES = {name: getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name.upper()}") for name in NAMES.split()}
# What is asked of each mix; the names are the keyword arguments of edgeq.quantizers.mix.plan.
OPTIONS = [
    {},
    {"imatrix": True},
    {"pure": True},
    {"output_tensor_type": "q5_k"},
    {"token_embedding_type": "q4_0"},
    {"leave_output_tensor": True},
    {"tensor_types": {r"blk\.[0-2]\.attn_v": "q8_0", "ffn_up": "q3_k"}},
]
FEW = 2  # of these are asked of models that are not in THOROUGH
THOROUGH = ("smollm2", "tinyllama", "odd")
# Architecture, vocabulary, width, feed-forward, layers, heads, heads of keys, length of a head, whether the
# output matrix is its own, experts.
MODELS = {
    "smollm2": ("llama", 49152, 576, 1536, 30, 9, 3, 64, False, 0),
    "gemma3-270m": ("gemma3", 262144, 640, 2048, 18, 4, 1, 256, False, 0),
    "qwen2.5-0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2, 64, False, 0),
    "qwen3-0.6b": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, False, 0),
    "tinyllama": ("llama", 32000, 2048, 5632, 22, 32, 4, 64, True, 0),
    "llama2-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, 128, True, 0),
    "llama3-70b": ("llama", 128256, 8192, 28672, 80, 64, 8, 128, True, 0),
    "mixtral": ("llama", 32000, 4096, 14336, 32, 32, 8, 128, True, 8),
    "odd": ("llama", 320, 48, 80, 3, 3, 3, 16, True, 0),
}


def shapes(arch, vocab, dim, ffn, layers, heads, kv_heads, head_dim, own_output, experts):
    """Shape of each tensor in NumPy order."""
    named = {"token_embd": (vocab, dim), "output_norm": (dim,)}
    if own_output:
        named["output"] = (vocab, dim)
    stack = (experts,) if experts else ()
    of_experts = "_exps" if experts else ""
    for i in range(layers):
        layer = {
            "attn_norm": (dim,),
            "attn_q": (heads * head_dim, dim),
            "attn_k": (kv_heads * head_dim, dim),
            "attn_v": (kv_heads * head_dim, dim),
            "attn_output": (dim, heads * head_dim),
            "ffn_norm": (dim,),
            f"ffn_gate{of_experts}": (*stack, ffn, dim),
            f"ffn_up{of_experts}": (*stack, ffn, dim),
            f"ffn_down{of_experts}": (*stack, dim, ffn),
        }
        if experts:
            layer["ffn_gate_inp"] = (experts, dim)
        if arch in ("gemma3", "qwen3"):
            layer |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
        if arch == "gemma3":
            layer |= {"post_attention_norm": (dim,), "post_ffw_norm": (dim,)}
        named |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    named = {f"{name}.weight": shape for name, shape in named.items()}
    if arch == "qwen2":
        for i in range(layers):
            sizes = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
            named |= {f"blk.{i}.attn_{x}.bias": (n,) for x, n in sizes.items()}
    return named


def hollow(path, arch, vocab, dim, ffn, layers, heads, kv_heads, head_dim, own_output, experts):
    """A float16 model without its weights."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    named = shapes(arch, vocab, dim, ffn, layers, heads, kv_heads, head_dim, own_output, experts)
    size = 0
    for name, shape in named.items():
        kind = gguf.GGMLQuantizationType.F16 if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        nbytes = (2 if len(shape) > 1 else 4) * int(gguf.np.prod(shape, dtype=object))
        writer.add_tensor_info(name, shape, gguf.np.dtype("f2" if len(shape) > 1 else "f4"), nbytes, kind)
        size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size + size + 32)
    return named


def ggml_type(name):
    """Number of a type."""
    return int(gguf.GGMLQuantizationType[name.upper()])


def planned(path, ftype, options):
    """{tensor: type}, in llama.cpp's order."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run, params.pure = ftype, True, options.get("pure", False)
    params.quantize_output_tensor = not options.get("leave_output_tensor", False)
    if "output_tensor_type" in options:
        params.output_tensor_type = ggml_type(options["output_tensor_type"])
    if "token_embedding_type" in options:
        params.token_embedding_type = ggml_type(options["token_embedding_type"])
    if options.get("imatrix"):  # one is there, whatever it says
        one = (ctypes.c_float * 1)(1)
        entries = (llama_cpp.llama_model_imatrix_data * 2)()
        entries[0] = llama_cpp.llama_model_imatrix_data(b"none.weight", one, 1)
        params.imatrix = entries
    if wanted := options.get("tensor_types"):
        overrides = (llama_cpp.llama_model_tensor_override * (len(wanted) + 1))()
        for i, (pattern, name) in enumerate(wanted.items()):
            overrides[i] = llama_cpp.llama_model_tensor_override(pattern.encode(), ggml_type(name))
        params.tt_overrides = overrides
    lines = []

    @llama_cpp.llama_log_callback
    def log(level, text, data):
        lines.append(text.decode())

    llama_cpp.llama_log_set(log, ctypes.c_void_p())
    if llama_cpp.llama_model_quantize(str(path).encode(), b"", ctypes.byref(params)):
        raise SystemExit("".join(lines))
    found = LINE.findall("".join(lines))
    return {name: (new or old).lower() for name, old, new in found}


def main():
    golden = {"llama-cpp-python": llama_cpp.__version__, "options": OPTIONS, "letters": {}, "models": {}}
    letters = golden["letters"]
    with tempfile.TemporaryDirectory() as folder:
        for name, sizes in MODELS.items():
            path = Path(folder) / f"{name}.gguf"
            named = hollow(path, *sizes)
            keys = (
                "arch",
                "vocab",
                "dim",
                "ffn",
                "layers",
                "heads",
                "kv_heads",
                "head_dim",
                "own_output",
                "experts",
            )
            rows, tables = {}, {}
            for mix, ftype in MIXES.items():
                tables[mix] = []
                for options in OPTIONS if name in THOROUGH else OPTIONS[:FEW]:
                    types = planned(path, ftype, options)
                    assert types.keys() == named.keys(), (name, mix, len(types), len(named))
                    for kind in types.values():
                        letters.setdefault(kind, chr(ord("a") + len(letters)))
                    row = "".join(letters[kind] for kind in types.values())
                    tables[mix].append(rows.setdefault(row, len(rows)))
            golden["models"][name] = {
                **dict(zip(keys, sizes, strict=True)),
                "rows": list(rows),
                "mixes": tables,
            }
            path.unlink()
            print(name, len(named))
    letters = {letter: kind for kind, letter in letters.items()}
    text = json.dumps(golden | {"letters": letters}, indent=1)
    GOLDEN.write_text(re.sub(r"\n +(?=\d|\](?!\n))", " ", text) + "\n")  # numbers side by side


if __name__ == "__main__":
    main()
