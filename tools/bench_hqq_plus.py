#!/usr/bin/env python3
"""HQQ+: what an adapter gives back of what few bits lose, as a Markdown table.

    python tools/bench_hqq_plus.py MODEL TRAIN.txt TEST.txt WORK [--bits 3 2] [--steps 200]

MODEL is a model of floats. For each number of bits HQQ makes a base of the matrices of its layers, in WORK,
and an adapter beside them all learns from TRAIN what MODEL says of it. TEST is scored as by `edgeq
perplexity`: perplexity, and KL divergence from MODEL. What is in WORK already is not made again.

Source: Badri and Shaji, Towards 1-bit Machine Learning Models, 2024 (mobiusml.github.io/1bit_blog).
"""

import argparse
from pathlib import Path

import edgeq
from edgeq.evaluate.perplexity import perplexity
from edgeq.train.lora import ALL, Settings
from edgeq.train.run import train_lora


def main() -> None:
    """Make what is missing, and print the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "train", "test", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 2])
    parser.add_argument("--group", type=int, default=64, help="columns that share a scale")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--chunks", type=int, default=10, help="of the test text")
    a = parser.parse_args()

    a.work.mkdir(exist_ok=True)
    text, settings = a.test.read_bytes().decode(), Settings(r=a.rank, target_modules=(ALL,))
    with edgeq.load(a.model) as whole:
        print("| weights | perplexity | KL divergence |\n|---|---:|---:|")
        print(
            f"| as they were | {perplexity(whole, text, chunks=a.chunks).perplexity.value:.2f} | |",
            flush=True,
        )
        for bits in a.bits:
            base, adapter = (a.work / f"{kind}-{bits}-{a.group}" for kind in ("hqq", f"adapter-{a.steps}"))
            if not base.exists():
                edgeq.quantize(a.model, base, f"i{bits}-g{a.group}-asym", method="hqq")
            if not adapter.exists():
                train_lora(
                    base,
                    a.train,
                    adapter,
                    settings=settings,
                    teacher=a.model,
                    length=a.length,
                    steps=a.steps,
                    batch=a.batch,
                    rate=a.rate,
                    warmup=a.steps // 20,
                    save_every=a.steps,
                )
            for beside, name in ((), f"HQQ, {bits} bits"), (adapter, f"with an adapter of rank {a.rank}"):
                with edgeq.load(base, lora=beside) as llm:
                    found = perplexity(llm, text, base=whole, chunks=a.chunks).estimates
                print(f"| {name} | {found['ppl'].value:.2f} | {found['kld_mean'].value:.3f} |", flush=True)


if __name__ == "__main__":
    main()
