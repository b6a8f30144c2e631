#!/usr/bin/env python3
"""Walk one real layer through every method, and write the page that tells of it.

    python tools/methods_page.py REFERENCE CALIBRATION OTHER [--layer blk.15.ffn_down] [--chunks 16]

REFERENCE is a model in f16 (tools/make_reference.py makes one of SmolLM2), CALIBRATION a text that the
methods look at (c4.txt), OTHER one that none of them has seen (wiki.test.raw). Writes the numbers into
edgeq/quantizers/README.md, between its marks, and the picture beside it.
"""

import argparse
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgeq import arch, calibrate, files, formats, kernels, tokenizer
from edgeq.evaluate.chart import Point, Series, axis, chart
from edgeq.evaluate.protocol import cut
from edgeq.grid import decode
from edgeq.quantizers.aqlm import aqlm
from edgeq.quantizers.awq import clip, rounded, search_scale
from edgeq.quantizers.gptq import costs, gptq
from edgeq.quantizers.hqq import hqq, ungrouped
from edgeq.quantizers.objective import error
from edgeq.quantizers.target import Target, target
from edgeq.ranges import mse

PAGE = Path(__file__).parents[1] / "edgeq" / "quantizers" / "README.md"
GRIDS = (("i4", 64), ("i3", 64), ("i2", 32))  # format, and columns that share scale and zero point
STYLE = """<style>
text{font:12px system-ui,sans-serif;fill:#777}.grid{stroke:#8884;fill:none}.axis{stroke:#888;fill:none}
.line{fill:none;stroke-width:2}.c0{stroke:#2a78d6;fill:#2a78d6}.c1{stroke:#d9722b;fill:#d9722b}
.c2{stroke:#2f9e5b;fill:#2f9e5b}.c3{stroke:#b5479d;fill:#b5479d}.c4{stroke:#8c6d1f;fill:#8c6d1f}
.c5{stroke:#4b4fb0;fill:#4b4fb0}.c6{stroke:#c03a3a;fill:#c03a3a}.c7{stroke:#2b8f97;fill:#2b8f97}.line{fill:none}
</style>"""


class Layer(NamedTuple):
    """Weights float32 (rows, cols), what is known of their inputs in the text that methods look at, and H of
    the other text.
    """

    w: np.ndarray
    inputs: calibrate.Inputs
    other: np.ndarray


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--layer", default="blk.15.ffn_down")
    parser.add_argument("--chunks", type=int, default=16)
    args = parser.parse_args()
    name = f"{args.layer}.weight"
    w, inputs = inputs_of(args.reference, args.calibration, name, args.chunks)
    layer = Layer(w, inputs, inputs_of(args.reference, args.other, name, args.chunks)[1].hessian)
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for method, run in METHODS.items():
        for format, group in GRIDS:
            to = target(format, w.shape[1], per=group, symmetric=False)
            start = time.monotonic()
            coded = run(layer, to)
            if coded is None:
                continue
            seconds = time.monotonic() - start
            weights = float(np.square(w - coded).sum() / np.square(w).sum())
            seen, unseen = error(w, coded, inputs.hessian), error(w, coded, layer.other)
            found.setdefault(method, []).append((weights, seen, unseen, seconds))
            print(f"{method:24} {format} {weights:.5f} {seen:.5f} {unseen:.5f} {seconds:6.2f} s", flush=True)
    about = f"`{name}` of `{args.reference.name}`, {w.shape[0]} x {w.shape[1]}"
    page = re.sub(
        r"(<!-- numbers -->\n).*(<!-- end -->)",
        lambda m: m[1] + numbers(about, args, found) + m[2],
        PAGE.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    PAGE.write_text(page, encoding="utf-8")
    (PAGE.parent / "methods.svg").write_text(picture(found), encoding="utf-8")


def inputs_of(reference: Path, text: Path, name: str, chunks: int) -> tuple[np.ndarray, calibrate.Inputs]:
    """A matrix of a model, and what is known of its inputs while the model reads."""
    _, windows = cut(text.read_text(encoding="utf-8"), tokenizer.load(reference), "llama.cpp", 512, chunks)
    model = calibrate.held(*files.read(reference), reference)
    for linear, inputs in calibrate.walk(model, windows):
        for part, w in linear.parts():
            if part == name:
                return w.copy(), inputs
    raise SystemExit(f"{reference} has no {name}")


def nearest(layer: Layer, to: Target) -> np.ndarray:
    """Each weight to the nearest level of a grid that covers all values."""
    grid = to.fit(layer.w, None)
    return decode(formats.encode(layer.w, grid), grid)


def least_squares(layer: Layer, to: Target) -> np.ndarray:
    """The same on the grids of least squared error."""
    group = to.width
    grid = formats.get(to.format).fit(layer.w, per=group, symmetric=False, choose=mse)
    return decode(formats.encode(layer.w, grid), grid)


def half_quadratic(layer: Layer, to: Target) -> np.ndarray:
    """HQQ, with float offsets, as its checkpoints have them."""
    codes, grid = hqq(layer.w, bits=formats.get(to.format).BITS, group=to.width)
    return ungrouped(decode(codes, grid), layer.w.shape, 1)


def scaled(layer: Layer, to: Target) -> np.ndarray:
    """AWQ's scales and clips, and the nearest levels."""
    h, inputs = layer.inputs.hessian, layer.inputs
    s = search_scale([layer.w], h, inputs.magnitudes / inputs.count, to).scale
    return rounded(clip(layer.w * s, h / np.outer(s, s), to), to) / s


def scaled_and_fed_back(layer: Layer, to: Target, **options: object) -> np.ndarray:
    """AWQ's scales for GPTQ, and GPTQ."""
    h, inputs = layer.inputs.hessian, layer.inputs
    s = search_scale(
        [layer.w], h, inputs.magnitudes / inputs.count, to, None, costs(h, to, 0.01, "groups")
    ).scale
    codes, grid = gptq(layer.w * s, h / np.outer(s, s), to, **options)
    return decode(codes, grid) / s


def fed_back(layer: Layer, to: Target, **options: object) -> np.ndarray:
    """GPTQ."""
    codes, grid = gptq(layer.w, layer.inputs.hessian, to, **options)
    return decode(codes, grid)


def additive(layer: Layer, to: Target) -> np.ndarray | None:
    """AQLM with two codebooks of 8 bits for groups of 8, beside the integers of 2 bits."""
    if to.format != "i2":
        return None
    with arch.turn(kernels.backend("numba"), kernels.cores()):
        found = aqlm(layer.w, layer.inputs.hessian)
    return formats.dequantize(formats.get("aqlm").pack(*found[:3]))


METHODS: dict[str, Callable[[Layer, Target], np.ndarray | None]] = {
    "rtn, all values": nearest,
    "rtn, least squares": least_squares,
    "hqq": half_quadratic,
    "awq": scaled,
    "gptq": fed_back,
    "gptq, groups in order": partial(fed_back, order="groups"),
    "gptq, and two sweeps": partial(fed_back, order="groups", sweeps=2),
    "awq+gptq": partial(scaled_and_fed_back, order="groups"),
    "aqlm, 2x8": additive,
}


def numbers(about: str, args: argparse.Namespace, found: dict[str, list[tuple[float, ...]]]) -> str:
    """The tables."""
    heads = " | ".join(f"{f[1]} bits, groups of {g}" for f, g in GRIDS)
    files = " ".join(path.name for path in (args.reference, args.calibration, args.other))
    command = f"python tools/methods_page.py {files} --chunks {args.chunks}"
    out = [f"{about}; H from {args.chunks} chunks of 512 tokens (`{command}`).\n"]
    for title, column in (
        ("Error of the output, ‖(W − Ŵ)X‖² / ‖WX‖², on the text that was looked at", 1),
        ("The same on another text", 2),
        ("Error of the weights, ‖W − Ŵ‖² / ‖W‖²", 0),
    ):
        out += [f"{title}:\n", f"| method | {heads} |", "|---|---:|---:|---:|"]
        for method, results in found.items():
            cells = [""] * (len(GRIDS) - len(results)) + [f"{100 * r[column]:.3g} %" for r in results]
            out.append(f"| {method} | {' | '.join(cells)} |")
        out.append("")
    return "\n".join(out)


def picture(found: dict[str, list[tuple[float, ...]]]) -> str:
    """Errors of the output on the other text, by bits."""
    bits = [int(f[1]) for f, _ in GRIDS]
    series = [
        Series(
            m,
            i,
            [Point(b, r[2], f"{m}: {r[2]:.4f}") for b, r in zip(bits[-len(results) :], results, strict=True)][
                ::-1
            ],
            line=True,
        )
        for i, (m, results) in enumerate(found.items())
    ]
    y = axis("error of the output", [p.y for s in series for p in s.points], log=True)
    x = axis("bits", bits)._replace(labels=[(b, str(b)) for b in bits])
    drawn = chart("Error of a layer's output by method", "The fewer bits, the further apart.", x, y, series)
    return drawn.replace('role="img">', 'role="img" xmlns="http://www.w3.org/2000/svg">' + STYLE, 1)


if __name__ == "__main__":
    main()
