"""`edgeq verify FILE`: whether a model file is what it should be."""

import json
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import click

from ._console import note, printable, progress, show, size, table

if TYPE_CHECKING:
    from ..evaluate.audit import Audit, Finding
    from ..evaluate.distance import Distance

SHOWN = 10  # problems, and remarks
FORMATS = ".3f", ".1f", ".3g", ".6f"  # of the columns of a distance
DISTANCE = ">ERROR, %", ">SQNR, dB", ">MAX", ">COSINE"


@click.command()
@click.argument("model", metavar="FILE")
@click.option("--against", metavar="ORIGINAL", help="Measure the error of each tensor against this model's.")
@click.option("--sha256", metavar="HEX", help="What the hash of FILE should be.")
@click.option("--full", is_flag=True, help="All tensors, problems and remarks.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def command(
    ctx: click.Context, model: str, against: str | None, sha256: str | None, full: bool, as_json: bool
) -> None:
    """Look at all of FILE, and tell whether it is sound; exit status 1 if it is not.

    FILE and ORIGINAL are .gguf files, Hugging Face folders, or names of models. Looked at are the structure,
    numbers that are not finite, dead groups (all weights equal) and saturated ones (most weights on the first
    or last level), and how far each tensor is from the original's.
    """
    from .. import catalog
    from ..evaluate.audit import audit, plain

    with progress() as report:
        path = catalog.resolve(model, download=False)
        original = None if against is None else catalog.resolve(against, report)
        found = audit(path, original, sha256=sha256, progress=report)
    if as_json:
        click.echo(json.dumps(plain(found), indent=1))
    else:
        show_all(found, full, against is not None)
    ctx.exit(0 if found.sound else 1)


def show_all(found: "Audit", full: bool, compared: bool) -> None:
    """Print an audit, for people."""
    for file in found.files:
        click.echo(printable(f"{file.name}: {file.bytes:,} bytes, sha256 {file.sha256}"))
    if found.findings:
        click.echo()
        show(tensors(found, compared) if full else formats(found, compared))
    for what, sentences in (("problem", [*found.problems, *found.far]), ("remark", found.remarks)):
        kept = sentences if full else sentences[:SHOWN]
        for sentence in kept:
            click.echo(printable(f"{what}: {sentence}"))
        if len(kept) < len(sentences):
            note(f"and {len(sentences) - len(kept):,} more {what}s: --full shows all")
    count = len(found.problems) + len(found.far)
    click.echo("sound" if found.sound else f"NOT SOUND: {count:,} problem{'s' if count > 1 else ''}")


def formats(found: "Audit", compared: bool) -> Any:
    """A row for each format."""
    rows: dict[str, dict[str, Finding]] = defaultdict(dict)
    for name, finding in found.findings.items():
        rows[finding.tensor.format][name] = finding
    columns = ["FORMAT", ">TENSORS", ">SIZE", ">GROUPS", ">DEAD", ">SATURATED"]
    made = table(*columns, *([">ERROR, %", ">WORST, %", "OF"] if compared else []))
    for format, named in rows.items():
        states = [f.health for f in named.values()]
        counts = [f"{sum(getattr(s, what) for s in states):,}" for what in ("groups", "dead", "saturated")]
        errors = [(f.distance.relative, name) for name, f in named.items() if f.distance]
        told = []
        if errors:
            worst, where = max(errors)
            mean = sum(error for error, _ in errors) / len(errors)
            told = [f"{100 * mean:.3f}", f"{100 * worst:.3f}", printable(where) if worst else ""]
        nbytes = size(sum(f.tensor.nbytes for f in named.values()))
        made.add_row(format, str(len(named)), nbytes, *counts, *told)
    return made


def tensors(found: "Audit", compared: bool) -> Any:
    """A row for each tensor."""
    columns = ["TENSOR", "FORMAT", ">SHAPE", ">GROUPS", ">DEAD", ">SATURATED", ">NOT FINITE"]
    made = table(*columns, *(DISTANCE if compared else ()))
    for name, (tensor, health, far) in found.findings.items():
        counts = [f"{n:,}" for n in (health.groups, health.dead, health.saturated, health.not_finite)]
        shape = " x ".join(map(str, tensor.shape))
        made.add_row(printable(name), tensor.format, shape, *counts, *(distances(far) if far else []))
    return made


def distances(far: "Distance") -> list[str]:
    """A distance as cells of a table: error in percent, SQNR in dB, largest, cosine."""
    values = 100 * far.relative, far.sqnr, far.maximum, far.cosine
    return ["" if math.isnan(x) else f"{x:{f}}" for x, f in zip(values, FORMATS, strict=True)]
