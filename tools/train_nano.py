#!/usr/bin/env python3
"""Train the models in models/: a small Llama from nothing, and from it one with ternary weights.

    python tools/train_nano.py tinystories.txt -o FOLDER

The text holds short texts with <|endoftext|> between them; the last of them are held out. FOLDER gets
nano.gguf in float16 and nano-ternary.gguf in TQ2_0, as they were when they predicted the held-out texts best,
and for each a folder with checkpoints, loss.csv and held_out.csv. The same command goes on where it was
interrupted.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeq import files, formats, tokenizer
from edgeq.files import gguf_writer
from edgeq.files.output import Entry, whole
from edgeq.tensor import Tensor
from edgeq.train import qat, scratch
from edgeq.train.backend import Network
from edgeq.train.loop import Loop, Options, mean_loss

SHAPE = scratch.Shape(layers=4, dim=256, ffn=512, heads=4, kv_heads=2, context=512)
ABOUT = {"general.name": "edgeq nano", "general.license": "mit", "general.languages": ["en"]}
HELD_OUT = 0.03  # of the texts


def note(text: str) -> None:
    """Tell how it goes."""
    print(text, file=sys.stderr, flush=True)


def texts_of(path: Path) -> tuple[list[str], list[str]]:
    """The texts of a file to learn from, and those held out; the last one may be cut off and is left out."""
    texts = [text.strip() for text in path.read_text(encoding="utf-8").split(scratch.END)][:-1]
    held_out = max(1, round(HELD_OUT * len(texts)))
    return texts[:-held_out], texts[-held_out:]


def joined(words: tokenizer.Tokenizer, texts: list[str]) -> np.ndarray:
    """The ids of texts one after the other, each behind the token that begins and ends them."""
    return np.array([id for text in [*texts, ""] for id in words.encode(text)], np.int64)


def write(path: Path, meta: dict[str, Any], made: dict[str, Tensor], floats: str) -> None:
    """Write a model, with the matrices that are still in float32 in the format `floats`."""
    entries = []
    for name, t in made.items():
        if t.format == "f32" and len(t.shape) > 1:
            t = formats.quantize(floats, formats.dequantize(t))
        entries.append(Entry(name, formats.get(t.format).GGML, t.shape, t.nbytes, lambda t=t: [t.data]))
    gguf_writer.write(path, meta, entries)


def follow(loop: Loop, score: Callable[[], float], best: Callable[[], None]) -> None:
    """Take the steps that are left; `best` is called whenever the score of held-out text is the lowest so
    far.
    """
    path = loop.folder / "held_out.csv"
    loop.folder.mkdir(parents=True, exist_ok=True)
    found: dict[int, float] = {}
    if loop.resume() and path.exists():
        with path.open() as f:
            found = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(f)}

    def saved() -> None:
        step = len(loop.curve)
        found[step] = score()
        loop.write_curve(loop.folder / "loss.csv")
        with whole(path, nbytes=1 << 16) as (new,):
            new.write_text("step,loss\n" + "".join(f"{s},{n:.5f}\n" for s, n in found.items()))
        note(f"step {step}: {found[step]:.4f} nats a token of held-out text")
        if found[step] == min(found.values()):
            best()

    def report(stage: str, done: int, total: int, told: str = "") -> None:
        minutes = (total - done) * np.mean([p.seconds for p in loop.curve[-20:]]) / 60
        note(f"{loop.folder.name} {done}/{total}, {told}, {minutes:.0f} min left")

    loop.run(report, saved)


def main() -> None:
    """Train both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--output", dest="folder", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=2048, help="tokens of the vocabulary")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--ternary-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--ternary-rate", type=float, default=3e-3)
    parser.add_argument(
        "--decay", type=float, default=0.3, help="of weights: a text of few epochs wants much"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    a = parser.parse_args()

    texts, held_out = texts_of(a.text)
    meta = scratch.metadata(SHAPE, scratch.vocabulary(texts, a.vocab)) | ABOUT
    words = tokenizer.from_gguf(meta)
    ids, test = joined(words, texts), joined(words, held_out)
    test = test[: (len(test) - 1) // a.length * a.length + 1]
    note(f"{len(ids):,} tokens to learn, {len(test):,} held out")
    order = scratch.Stretches(ids, a.batch, a.length, a.seed)

    def learn(
        network: Network, path: Path, name: str, floats: str, steps: int, rate: float, **how: Any
    ) -> None:
        options = Options(
            steps=steps,
            batch=a.batch,
            rate=rate,
            warmup=steps // 20,
            floor=0.05,
            optimizer="muon",
            decay=a.decay,
            seed=a.seed,
            save_every=a.save_every,
        )
        loop = Loop(network, network.parameters, order, options, a.folder / path.stem, **how)
        about = meta | {"general.name": name}
        follow(
            loop,
            lambda: mean_loss(network, test, a.length),
            lambda: write(path, about, qat.exported(network), floats),
        )

    def all_learn(name: str) -> bool:
        return True

    nano, ternary = a.folder / "nano.gguf", a.folder / "nano-ternary.gguf"
    begin = scratch.tensors(SHAPE, a.vocab, a.seed)
    learn(Network(meta, begin, nano, trained=all_learn), nano, "edgeq nano", "f16", a.steps, a.rate)

    known = files.read(nano)
    teacher = qat.Teacher(Network(*known, nano))
    network = Network(*known, ternary, trained=all_learn)
    qat.attach(network, "tq2_0", choose=qat.mean, activations=True)
    learn(
        network,
        ternary,
        "edgeq nano ternary",
        "q8_0",
        a.ternary_steps,
        a.ternary_rate,
        begin=lambda step, turn, batch: teacher.begin(batch),
        loss=teacher,
    )


if __name__ == "__main__":
    main()
