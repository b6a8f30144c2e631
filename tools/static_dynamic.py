#!/usr/bin/env python3
"""What rounding weights and inputs to 8 bits costs, and what it brings: static and dynamic, by what shares a
scale, and by observer.

    python tools/static_dynamic.py REFERENCE CALIBRATION TEXT [--chunks 8] [--read 16] [--speed]

REFERENCE is a model in f16 (tools/make_reference.py makes one of SmolLM2), CALIBRATION is c4.txt, of
which --read chunks of 512 tokens are observed, TEXT is wiki.test.raw, of which --chunks are predicted as
llama-perplexity does. Prints a Markdown table of perplexity and KL divergence from the reference; with
--speed one of tokens a second, the best of several turns in which all take part.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgeq import quantizers, tokenizer
from edgeq.arch import Model
from edgeq.evaluate.estimates import exp_mean, mean
from edgeq.evaluate.perplexity import predictions, score
from edgeq.evaluate.protocol import cut
from edgeq.inputs import Inputs
from edgeq.observers import OBSERVERS, make
from edgeq.quantizers import Plan, integers, layerwise
from edgeq.quantizers.layerwise import Calibration
from edgeq.quantizers.static import encoded, inputs_of

TURNS, GENERATED = 5, 24


class All:
    """One observer of each kind."""

    def __init__(self) -> None:
        self.each = {name: make(name) for name in OBSERVERS}

    def look(self, x: np.ndarray) -> None:
        """Take a batch into account."""
        for observer in self.each.values():
            observer.look(x)


def variants(plan: Plan, look: Calibration) -> Iterator[tuple[str, Plan]]:
    """(name, plan of it)."""
    matrices = list(integers.matrices(plan))

    def of(per: str, inputs: dict[str, Inputs] | Inputs | None) -> Plan:
        made = {}
        for t, w in matrices:
            own = inputs[t.name] if isinstance(inputs, dict) else inputs
            made[t.name] = encoded(t, w, per, own)
        return layerwise.put(plan, made)

    yield "weights only | channel | 16 bits", of("channel", None)
    for per in ("channel", "tensor"):
        for share in ("token", "block"):
            yield f"dynamic | {per} | {share}", of(per, Inputs(share))
    seen = integers.observe(plan, look, All, None)
    for symmetric in (True, False):
        for per in ("channel", "tensor") if symmetric else ("channel",):
            for name in OBSERVERS:
                fixed = {n: inputs_of(o.each[name], symmetric) for names, o in seen.items() for n in names}
                yield f"static | {per} | {name}{'' if symmetric else ', zero points'}", of(per, fixed)
    for alpha in (0.5, 0.7):
        smooth = layerwise.apply("smooth", plan, look, alpha=alpha)
        for method, options in (
            ("static", {}),
            ("static", {"observer": "percentile"}),
            ("static", {"per": "tensor"}),
            ("dynamic", {}),
        ):
            name = f"smooth {alpha} + {method} | {options.get('per', 'channel')} | "
            name += "token" if method == "dynamic" else options.get("observer", "minmax")
            yield name, layerwise.apply(method, smooth, look, **options)


def quality(model: Model, windows: np.ndarray, first: int, base: list[np.ndarray]) -> list[np.ndarray]:
    """ln p slice by slice if `base` is empty; else nll and KL divergence of all scored tokens."""
    cache, targets = model.new_cache(windows.shape[1]), windows[:, first:]
    made = [s for w in windows for s in predictions("model", model, cache, w, targets.shape[1])]
    if not base:
        return made
    right = np.split(targets.reshape(-1), np.cumsum([len(s) for s in made])[:-1])
    found = [score(t, p, b.astype(np.float64)) for t, p, b in zip(right, made, base, strict=True)]
    return [np.concatenate([f[0] for f in found]), np.concatenate([f[2] for f in found])]


def speeds(models: dict[str, Model], window: np.ndarray) -> None:
    """Print a table of tokens a second."""
    best = {name: [np.inf, np.inf] for name in models}
    for _ in range(TURNS):
        for name, model in models.items():
            cache = model.new_cache(len(window) + GENERATED)
            start = time.perf_counter()
            model(window, cache)
            middle = time.perf_counter()
            for token in window[:GENERATED]:
                model([token], cache)
            end = time.perf_counter()
            best[name] = [min(best[name][0], middle - start), min(best[name][1], end - middle)]
    print("\n| layers | prompt, tokens/s | answer, tokens/s |\n|---|---:|---:|")
    for name, (prompt, answer) in best.items():
        print(f"| {name} | {len(window) / prompt:.0f} | {GENERATED / answer:.1f} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--read", type=int, default=16)
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    plan = quantizers.plan(args.reference, "copy")
    look = Calibration(args.calibration.read_text(encoding="utf-8"), args.read)
    protocol, windows = cut(
        args.text.read_bytes().decode(), tokenizer.load(args.reference), "llama.cpp", chunks=args.chunks
    )
    reference = layerwise.model(plan)
    if args.speed:
        wanted = {"weights only": "weights only | channel | 16 bits"}
        wanted |= {f"dynamic, {share}": f"dynamic | channel | {share}" for share in ("token", "block")}
        wanted["static"] = "static | channel | minmax"
        models = {"f16": reference}
        for name, made in variants(plan, look._replace(chunks=1)):
            if name in wanted.values():
                models[next(k for k, v in wanted.items() if v == name)] = layerwise.model(made)
            if len(models) == len(wanted) + 1:
                break
        speeds(models, windows[0])
        return
    base = [s.astype(np.float32) for s in quality(reference, windows, protocol.first_scored, [])]
    print("| method | scale of weights | of inputs | perplexity | KLD |\n|---|---|---|---:|---:|")
    nll, _ = quality(reference, windows, protocol.first_scored, base)
    print(f"| f16 | | | {exp_mean(nll)[0]:.2f} | 0 |", flush=True)
    for name, made in variants(plan, look):
        nll, kld = quality(layerwise.model(made), windows, protocol.first_scored, base)
        print(f"| {name} | {exp_mean(nll)[0]:.2f} | {mean(kld)[0]:.4f} ± {mean(kld)[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
