"""`edgeq quantize SRC DST TYPE`: a smaller file of a model."""

import json
import math
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._console import note, orderly, printable, progress, show, size, table
from ._model import TEXT_FILE, option, read_text, usage
from ._output import SPLIT, THREADS
from .convert import LAYOUTS

if TYPE_CHECKING:
    from ..quantizers import Plan


def _tensor_types(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """("attn_v=q8_0",) -> {"attn_v": "q8_0"}."""
    types = {}
    for value in values:
        pattern, _, type = value.rpartition("=")
        if not pattern or not type:
            raise click.BadParameter(f"{value!r} is no expression with a type, such as attn_v=q8_0")
        types[pattern] = type.lower()
    return types


def _method_options(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """("damp=0.02", "static=true") -> {"damp": 0.02, "static": True}."""
    options: dict[str, Any] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals:
            raise click.BadParameter(f"{value!r} is no option with a value, such as damp=0.02")
        with suppress(ValueError):  # what is no JSON is a word
            text = json.loads(text)
        options[name] = text
    return options


def _lower(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return value and value.lower()


OPTIONS = (
    option("--pure", is_flag=True, help="The same type for all matrices."),
    option("--output-tensor-type", metavar="TYPE", callback=_lower, help="Type of output.weight."),
    option("--token-embedding-type", metavar="TYPE", callback=_lower, help="Type of token_embd.weight."),
    option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", callback=_tensor_types,
            help="Type of tensors whose name has a match; the first one counts."),
    option("--leave-output-tensor", is_flag=True, help="Keep output.weight as it is."),
    option("--allow-requantize", is_flag=True, help="Take a quantized source, which loses quality twice."),
    option("--imatrix", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Importance matrix of llama.cpp (GGUF or .dat)."),
)  # fmt: skip


METHOD = (
    option("--auto", "bits", metavar="BITS", type=click.FloatRange(1, 16),
           help="Choose a type for each tensor, for so many bits per weight; in the place of TYPE."),
    option("--method", metavar="NAME", callback=_lower, default="rtn",
           help="Choose codes with gptq, hqq, awq, or several in turn: awq+gptq. rtn: each the nearest. "
            "aqlm, static, dynamic, smooth+static, ternary and binary write a folder and take no TYPE."),
    option("--layout", type=click.Choice(LAYOUTS),
            help="Whose layout integers have in a folder. Unless given: compressed-tensors; hqq for the zero "
            "points of --method hqq, which are no integers."),
    option("--option", "method_options", multiple=True, metavar="NAME=VALUE", callback=_method_options,
            help="Of the method, such as damp=0.02."),
    option("--calibration", type=TEXT_FILE,
            help="Text that methods look at, in UTF-8. Unless given, the model makes one up."),
    option("-s", "--seed", type=int, default=0, help="For a text that is made up."),
    option("--chunks", type=click.IntRange(1), default=128, help="How many pieces of it."),
    option("-c", "--ctx-size", "ctx", type=click.IntRange(8), default=512, help="Tokens of a piece."),
    option("--report", type=click.Path(dir_okay=False, path_type=Path),
            help="JSON file for the error of each matrix, |(W - W')X|^2 / |WX|^2; after hqq, which looks at "
            "no X, |W - W'|^2 / |W|^2."),
    option("--resume", is_flag=True,
            help="Go on with what gptq, awq or aqlm had made when they were interrupted, in DST.made."),
)  # fmt: skip


@click.command(
    params=[
        click.Argument(["names"], nargs=-1, metavar="SRC [DST] TYPE"),
        *OPTIONS,
        *METHOD,
        option("--dry-run", is_flag=True, help="Only print what would be written."),
        SPLIT,
        THREADS,
    ]
)
def command(
    names: tuple[str, ...],
    dry_run: bool,
    max_size: int | None,
    threads: int | None,
    method: str,
    method_options: dict[str, Any],
    calibration: Path | None,
    chunks: int,
    ctx: int,
    seed: int,
    bits: float | None,
    report: Path | None,
    resume: bool,
    layout: str | None,
    **options: Any,
) -> None:
    """Write the model SRC to DST as TYPE.

    SRC is a Hugging Face folder, a .gguf file, or the name of a model. DST is a GGUF file, in which each
    tensor gets the type that llama-quantize would give it, where TYPE is one of:

    f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q3_k_l, q3_k_m, q3_k_s, q2_k, iq4_nl, iq4_xs,
    q5_1, q5_0, q4_1, q4_0, tq1_0, tq2_0, mxfp4_moe, copy.

    DST is a Hugging Face folder with integers: i8, i4, i3 or i2 with a scale a row, i4-g64 with one for 64
    columns, i4-g64-asym with zero points, too, and i1-g32-asym, which has to. So it is with the methods aqlm,
    static, dynamic, ternary and binary, which take no TYPE. Matrices of the layers become that; the rest
    stays as it is.
    """
    from .. import catalog, quantizers
    from ..evaluate.laboratory import write
    from ..kernels import scratch

    folder = method.split("+")[-1] in quantizers.layerwise.FOLDERS
    if bits is None and folder and len(names) == 2:
        names = *names, "copy"
    fixed = 2 if bits is None else 1  # words beside DST
    if len(names) != fixed + 1 and not (dry_run and len(names) == fixed):
        raise click.UsageError("expected SRC DST TYPE (with --dry-run no DST, with --auto no TYPE)")
    start = time.monotonic()
    text = None if calibration is None else read_text(calibration)
    look = quantizers.layerwise.Calibration(text, chunks, ctx, seed, threads=threads)
    with usage(), progress() as bar:
        path = catalog.resolve(names[0], bar)
        if bits is None:
            plan = quantizers.plan(path, names[-1], **options)
        else:
            plan = quantizers.automatic(path, bits, look, bar, **options)
    if len(names) > fixed:
        with usage():
            quantizers.check(plan, names[1], method, layout)
    if dry_run:
        print_plan(plan)
        return
    errors: dict[str, float] = {}
    before = sum(r.tensor.nbytes for r in plan.recodings)
    found = errors.__setitem__ if report else None
    keep = Path(names[1]).with_name(Path(names[1]).name + ".made")
    if not resume:
        quantizers.discard(keep)
    scratch.keep_nothing_else()
    with usage(), progress() as bar, orderly():
        try:
            plan = quantizers.layerwise.apply(method, plan, look, bar, found, keep, **method_options)
        except (KeyboardInterrupt, SystemExit):
            if keep.exists():
                note(f"{keep} holds what was made; the same command with --resume goes on from there")
            raise
    if report:
        made = {
            "model": names[0],
            "type": names[-1] if bits is None else f"auto {bits:g}",
            "method": method,
            "errors": errors,
        }
        write(report, json.dumps(made, indent=1) + "\n")
    with progress() as bar, orderly():
        paths = quantizers.write(
            plan, names[1], layout=layout, max_size=max_size, threads=threads, progress=bar
        )
    done = summary(plan, before)
    del plan  # and with it what lies in that folder
    quantizers.discard(keep)
    note(f"{done}, in {time.monotonic() - start:.1f} s")
    for path in paths:
        click.echo(path)


def print_plan(plan: "Plan") -> None:
    """A row for each tensor, and what they add up to."""
    rows = table("TENSOR", ">SHAPE", "FROM", "TO", ">BYTES")
    for r in plan.recodings:
        shape = " x ".join(map(str, r.tensor.shape))
        rows.add_row(printable(r.tensor.name), shape, r.tensor.format, r.format, f"{r.nbytes:,}")
    show(rows)
    click.echo(summary(plan, sum(r.tensor.nbytes for r in plan.recodings)))


def summary(plan: "Plan", before: int) -> str:
    """Size and bits per weight, before and as planned, and the share of each format."""
    weights = sum(math.prod(r.tensor.shape) for r in plan.recodings)
    after = sum(r.nbytes for r in plan.recodings)
    formats: Counter[str] = Counter()
    for r in plan.recodings:
        formats[r.format] += r.nbytes
    shares = ", ".join(f"{name} {size(n)}" for name, n in formats.most_common())
    bits = [f"{8 * n / max(weights, 1):.2f}" for n in (before, after)]
    return f"{size(before)} ({bits[0]} bits per weight) to {size(after)} ({bits[1]}): {shares}"
