#!/usr/bin/env python3
"""What quantizing costs: size, perplexity and KL divergence of each type, beside llama-quantize's figures.

    python tools/bench_quality.py REFERENCE TEXT WORK [--imatrix FILE] [--chunks 40] [--types q4_k_m ...]
        [--methods gptq awq+gptq ... --calibration FILE [--pieces 128] [--option NAME=VALUE ...]]

REFERENCE is a model in f16 (tools/make_reference.py makes one of SmolLM2), TEXT is wiki.test.raw. With
an importance matrix (edgeq imatrix -m REFERENCE -f c4.txt --chunks 100) each type is measured with it, too,
and with each method that is named, which looks at so many pieces of the text for calibration.
Prints a Markdown table; seconds are processor time, and memory the peak so far. WORK keeps the reference's
probabilities, 2 GB for 40 chunks, and results.json: what has been measured is not measured again, as long as
the quantized file has the same bytes.

The other figures were made by llama-quantize and llama-perplexity from the same reference, with 40 chunks of
512 tokens and importance from 100 chunks of c4.txt.
"""

import argparse
import hashlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import edgeq
from edgeq.evaluate.estimates import exp_mean, mean
from edgeq.evaluate.perplexity import predictions, score
from edgeq.evaluate.protocol import cut
from edgeq.quantizers.layerwise import Calibration, check

# type: bytes, perplexity and mean KLD, the same with importance
PEER: dict[str, tuple[int, tuple[float, float] | None, tuple[float, float] | None]] = {
    "q8_0": (144_810_912, (23.59, 0.0043), None),
    "q6_k": (138_382_752, (23.76, 0.0101), None),
    "q5_k_m": (112_103_328, (24.48, 0.0519), None),
    "q5_0": (104_997_792, (25.94, 0.0924), None),
    "q4_k_m": (105_453_984, (25.70, 0.0749), (25.00, 0.0501)),
    "q4_1": (98_362_272, (31.16, 0.309), (25.26, 0.0725)),
    "q4_0": (91_726_752, (29.81, 0.312), (26.81, 0.198)),
    "iq4_nl": (91_726_752, None, (26.41, 0.119)),
    "q3_k_m": (93_510_048, (28.81, 0.196), (26.35, 0.127)),
    "q2_k": (88_201_632, (33.60, 0.453), (29.04, 0.311)),
}


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--types", nargs="+", default=PEER, metavar="TYPE")
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--pieces", type=int, default=128)
    parser.add_argument("--option", nargs="+", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    bench = Bench(args.reference, args.text.read_bytes().decode(), args.work, args.chunks)
    text = args.calibration.read_bytes().decode() if args.calibration else None
    look = Calibration(text, args.pieces)
    given = {key: json.loads(value) for key, value in (option.split("=", 1) for option in args.option)}
    ways: dict[str, dict[str, Any]] = {"": {}}
    if args.imatrix:
        ways["imatrix"] = {"imatrix": args.imatrix}
    for method in args.methods:
        known = {key for of in check(method).values() for key in of}
        own = {key: value for key, value in given.items() if key in known}
        ways[method] = {"method": method, "calibration": look, "method_options": own}
    print("| type | method | bytes | llama.cpp's | perplexity | llama.cpp's | KLD | llama.cpp's | s | MB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in args.types:
        for way, how in ways.items():
            nbytes, *peers = PEER[name]
            theirs = peers[way != ""] or peers[0]
            r = bench.measured(name, way, how)
            ppl, kld = map(str, theirs) if theirs else ("", "")
            found = f"{r['ppl'][0]:.2f} | {ppl} | {r['kld'][0]:.4f} ± {r['kld'][1]:.4f} | {kld}"
            cost = f"{r['seconds']:.0f} | {r['memory'] / 1e6:.0f}" if "seconds" in r else " | "
            print(f"| {name} | {way} | {r['bytes']:,} | {nbytes:,} | {found} | {cost} |", flush=True)


class Bench:
    """A reference, and the chunks of a text that it has read."""

    def __init__(self, reference: Path, text: str, work: Path, chunks: int) -> None:
        self.reference, self.text, self.work, self.chunks = reference, text, work, chunks
        self.results = work / "results.json"

    def measured(self, name: str, way: str, how: dict[str, Any]) -> dict:
        """Bytes, perplexity and KL divergence of a type, and the errors of both; what it took to make it."""
        path = self.work / f"{name}-{way}.gguf"
        start = time.process_time()
        edgeq.quantize(self.reference, path, name, **how)
        cost = {"seconds": time.process_time() - start}
        cost["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with open(path, "rb") as f:
            key = f"{name} {hashlib.file_digest(f, 'sha256').hexdigest()} {self.chunks}"
        known = json.loads(self.results.read_text()) if self.results.exists() else {}
        if key not in known:
            nll, kld = self.compare(path)
            found = cost | {"bytes": path.stat().st_size, "ppl": exp_mean(nll), "kld": mean(kld)}
            self.results.write_text(json.dumps(known | {key: found}, indent=1))
        path.unlink()
        return json.loads(self.results.read_text())[key]

    def compare(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """nll and KL divergence of all scored tokens."""
        parts = []
        for targets, base, log_p in zip(*self.base(), self.read(path), strict=True):
            nll, _, kld, _ = score(targets, log_p, np.asarray(base, np.float64))
            parts.append((nll, kld))
        nll, kld = map(np.concatenate, zip(*parts, strict=True))
        return nll, kld

    def read(self, path: Path) -> Iterator[np.ndarray]:
        """ln p at all scored places, slice by slice; the first time also what is right there."""
        with edgeq.load(path) as llm:
            protocol, windows = cut(self.text, llm.tokenizer, "llama.cpp", chunks=self.chunks)
            cache = llm.model.new_cache(protocol.ctx)
            self.targets = windows[:, protocol.first_scored :]
            for window in windows:
                yield from predictions(path.name, llm.model, cache, window, self.targets.shape[1])

    def base(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of the reference: what is right, and ln p, float32, slice by slice."""
        file = self.work / f"base-{self.chunks}.npy"
        sizes = self.work / f"base-{self.chunks}-targets.npz"
        if not file.exists():
            slices = [s.astype(np.float32) for s in self.read(self.reference)]
            np.savez(sizes, targets=self.targets, lengths=[len(s) for s in slices])
            np.save(file, np.concatenate(slices))
        kept = np.load(sizes)
        ends = np.cumsum(kept["lengths"])[:-1]
        return np.split(kept["targets"].reshape(-1), ends), np.split(np.load(file, mmap_mode="r"), ends)


if __name__ == "__main__":
    main()
