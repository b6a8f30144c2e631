#!/usr/bin/env python3
"""Compare edgeq's conversion of Hugging Face folders with llama.cpp's converter, and run the files.

    python tools/check_conversion.py --converter LLAMA.CPP/convert_hf_to_gguf.py [--outtype f16] FOLDER ...

With no FOLDER, the tiny models of tests/golden/arch are taken, with a tokenizer of their own; but not those
of Gemma and Qwen, whose classes in Transformers know their own tokenizers only (`edgeq convert` makes folders
of GGUF files). llama.cpp gives Mistral no window, so its logits differ there. For each:

    tensors     edgeq's GGUF file against the converter's: names, types, bytes
    metadata    keys that differ
    logits      largest difference of llama.cpp and of edgeq's exact path (the file) to Transformers (the
                folder)
    ids         of texts, by the same three
    back        the folder made of the file: Transformers' logits and ids again

needs torch, transformers, llama-cpp-python and sentencepiece, edgeq's own requirements except Numba, and a
copy of llama.cpp's repository (one is in the source archive of llama-cpp-python).
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from folders import GOLDEN, complete  # noqa: E402

from edgeq import arch, files, quantizers, tokenizer  # noqa: E402
from edgeq.convert.huggingface import to_huggingface  # noqa: E402

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock, isn't it?",
    "def f(x):\n    return x ** 2  # square\n\n\n\tprint(f(1234567))",
    "Zażółć gęślą jaźń — 你好，世界！ 🙂 naïve café\r\n",
]
# The converter knows ways to cut text by a hash of a whole vocabulary; those of tiny models it must be told.
WRAPPER = """
import runpy, sys
sys.path.insert(0, {folder!r})
sys.path.insert(1, {folder!r} + "/gguf-py")
from conversion.base import TextModel
if {pre!r}:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(converter, folder, path, outtype, pre):
    """The converter's file."""
    argv = [str(converter), str(folder), "--outfile", str(path), "--outtype", outtype]
    code = WRAPPER.format(folder=str(converter.parent), pre=pre, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def compare_files(mine, theirs):
    """Print what differs."""
    a, b = gguf.GGUFReader(mine), gguf.GGUFReader(theirs)
    ours, others = ({t.name: (t.tensor_type.name, t.data.tobytes()) for t in r.tensors} for r in (a, b))
    wrong = sorted(n for n in ours.keys() | others.keys() if ours.get(n) != others.get(n))
    print(f"  tensors: {len(others) - len(wrong)} of {len(others)} equal", *wrong[:8])
    ours, others = (
        {k: (f.types, f.contents()) for k, f in r.fields.items() if not k.startswith("GGUF.")} for r in (a, b)
    )
    differ = [k for k in ours if k in others and ours[k] != others[k]]
    print("  metadata: only edgeq's:", *sorted(ours.keys() - others.keys()))
    print("            only the converter's:", *sorted(others.keys() - ours.keys()))
    print("            different:", *differ)


def by_transformers(folder, ids):
    """Logits, and ids of the texts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    return logits, [tok.encode(text, add_special_tokens=False) for text in TEXTS]


def by_llama(path, ids):
    """Logits, and ids of the texts."""
    llm = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False, n_threads=2)
    llm.eval(ids)
    return np.array(llm.scores[: len(ids)]), [
        llm.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS
    ]


def by_edgeq(path, ids):
    """Logits, and ids of the texts."""
    model = arch.load(*files.read(path), backend="numpy", path=path)
    tok = tokenizer.load(path)
    logits = model(ids, model.new_cache(len(ids)), "all")
    return logits, [tok.encode(text, add_special=False) for text in TEXTS]


def check(folder, scratch, converter, outtype, pre):
    """All comparisons for one folder."""
    print(folder.name)
    mine, theirs = scratch / "edgeq.gguf", scratch / "converter.gguf"
    quantizers.quantize(folder, mine, outtype)
    convert(converter, folder, theirs, outtype, pre)
    compare_files(mine, theirs)
    ids = np.random.default_rng(0).integers(0, min(1000, tokenizer.load(folder).vocab_size), 40).tolist()
    reference, words = by_transformers(folder, ids)
    for name, (logits, found) in (("llama.cpp", by_llama(mine, ids)), ("edgeq", by_edgeq(mine, ids))):
        report(name, logits, found, reference, words)
    to_huggingface(mine, scratch / "back")
    report("back", *by_transformers(scratch / "back", ids), reference, words)


def report(name, logits, found, reference, words):
    """Print how close logits and ids are to the reference."""
    same = "ids equal" if found == words else f"ids differ: {found} and {words}"
    distance = np.abs(logits - reference).max() / reference.std()
    print(f"  {name}: logits within {distance:.1e} of their spread, {same}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--outtype", default="f16")
    parser.add_argument("folders", nargs="*", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        jobs = [(folder, "") for folder in args.folders]
        if not jobs:
            tiny = sorted(
                path.name for path in GOLDEN.iterdir() if path.name.startswith(("llama", "mistral"))
            )
            jobs = [(complete(name, scratch / name), "smollm") for name in tiny]
        for folder, pre in jobs:
            work = scratch / f"{folder.name}-work"
            work.mkdir()
            check(folder, work, args.converter, args.outtype, pre)


if __name__ == "__main__":
    main()
