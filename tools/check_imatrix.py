#!/usr/bin/env python3
"""Compare `edgeq imatrix` with llama.cpp's llama-imatrix, on the same model and text.

    python tools/check_imatrix.py --llama-imatrix PATH [-c 512] [--chunks 10] MODEL-f16.gguf TEXT
    python tools/check_imatrix.py --llama-imatrix PATH --golden SHARED/data

The second writes tests/golden/imatrix.gguf: what llama-imatrix measures of stories260k in the first 4,000
characters of tinystories.txt. llama-imatrix is built from the source archive of llama-cpp-python, whose
vendor/llama.cpp has it in tools/imatrix.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import edgeq
from edgeq import calibrate
from edgeq.files import imatrix

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "imatrix.gguf"
CTX, CHUNKS, CHARACTERS = 128, 6, 4000  # of the golden


def main() -> None:
    """Compare, or write the golden."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--llama-imatrix", type=Path, required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--golden", type=Path)
    parser.add_argument("paths", type=Path, nargs="*")
    args = parser.parse_args()
    if args.golden:
        with tempfile.TemporaryDirectory() as scratch:
            model, text = Path(scratch) / "model.gguf", Path(scratch) / "tinystories.txt"
            edgeq.quantize(args.golden / "stories260k", model, "f32")
            text.write_text((args.golden / "text" / text.name).read_text(encoding="utf-8")[:CHARACTERS])
            by_llama(args.llama_imatrix, model, text, GOLDEN, CTX, CHUNKS)
        return
    model, text = args.paths
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "imatrix.gguf"
        by_llama(args.llama_imatrix, model, text, path, args.ctx_size, args.chunks)
        theirs = imatrix.read(path)
    with edgeq.load(model) as llm:
        ours = calibrate.imatrix(llm, text.read_bytes().decode(), ctx=args.ctx_size, chunks=args.chunks)
    assert ours.importance.keys() == theirs.importance.keys()
    pairs = [(ours.importance[name], theirs.importance[name]) for name in theirs.importance]
    errors = np.concatenate([np.abs(a / b - 1) for a, b in pairs])
    print(f"{len(pairs)} matrices, {errors.size:,} columns; relative differences:")
    print(f"median {np.median(errors):.1e}, 99 % {np.quantile(errors, 0.99):.1e}, largest {errors.max():.1e}")


def by_llama(program: Path, model: Path, text: Path, out: Path, ctx: int, chunks: int) -> None:
    """The file of llama-imatrix."""
    words = [program, "-m", model, "-f", text.name, "-o", out.resolve(), "-c", ctx, "-b", ctx]
    words += ["--chunks", chunks, "--no-ppl"]
    subprocess.run(list(map(str, words)), check=True, cwd=text.parent, capture_output=True)


if __name__ == "__main__":
    main()
