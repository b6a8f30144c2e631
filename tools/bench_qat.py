#!/usr/bin/env python3
"""Perplexity in full precision, after rounding, and after quantization-aware training, as a Markdown table.

    python tools/bench_qat.py MODEL TRAIN.txt TEST.txt [--steps 400] [--types i8 i4 ternary]

MODEL is a Hugging Face folder or a GGUF file of floats. Only the matrices of the layers are quantized. The
same number of steps in full precision stands beside, as the text alone makes a model better. A row tells what
share of the loss in nats that rounding costs the training recovers.
"""

import argparse
import sys
from math import exp
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgeq import files, tokenizer
from edgeq.train import data, qat, tape
from edgeq.train.backend import Network
from edgeq.train.loop import Loop, Options


def nats(network: Network, examples: list[data.Example]) -> float:
    """Mean loss of a token."""
    loss, count = 0.0, 0
    for e in examples:
        logits = tape.value(network.head(network.hidden(e.ids[None, :-1])))
        loss += float(tape.cross_entropy(logits, e.ids[1:], np.ones(len(e.ids) - 1, np.float32)))
        count += len(e.ids) - 1
    return loss / count


def main() -> None:
    """Train, and print the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--types", nargs="+", default=["i8", "i4", "ternary"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--examples", type=int, default=40, help="of the test text")
    parser.add_argument("--distill", action="store_true")
    a = parser.parse_args()

    meta, tensors = files.read(a.model)
    words = tokenizer.load(a.model)
    texts = [data.read(path, words, None, a.length) for path in (a.train, a.test)]
    order, test = data.Order(texts[0], a.batch, 0), texts[1][: a.examples]
    options = Options(steps=a.steps, batch=a.batch, rate=a.rate, warmup=a.steps // 20, save_every=a.steps)

    def network() -> Network:
        return Network(meta, tensors, a.model, trained=lambda name: name.startswith("blk."))

    def trained(format: str | None) -> tuple[float, float]:
        net = network()
        if format is not None:
            qat.attach(net, format, activations=format in ("ternary", "binary"))
        before, teacher = nats(net, test), qat.Teacher(network())
        with TemporaryDirectory() as folder:
            chosen = {"begin": lambda s, t, b: teacher.begin(b), "loss": teacher} if a.distill else {}
            loop = Loop(net, net.parameters, order, options, Path(folder), **chosen)
            loop.run(lambda stage, done, total, found: print(format, done, found, file=sys.stderr))
        return before, nats(net, test)

    whole, better = trained(None)
    print(f"{a.steps} steps of {a.batch} x {a.length} tokens, {len(test)} x {a.length} tokens scored\n")
    print("| type | rounded | trained | recovered |\n|---|---|---|---|")
    print(f"| f32 | {exp(whole):.3f} | {exp(better):.3f} | |")
    for format in a.types:
        rounded, after = trained(format)
        share = (rounded - after) / (rounded - whole)
        print(f"| {format} | {exp(rounded):.3f} | {exp(after):.3f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
