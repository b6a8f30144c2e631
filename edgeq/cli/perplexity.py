"""`edgeq perplexity -m MODEL -f TEXT`: how well a model predicts a text, and how far it is from a base.

What is measured has the names that llama-perplexity prints.
"""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ._console import Progress, note, printable, progress, show, table
from ._model import COUNT, LOADING, MODEL, TEXT_FILE, open_model, option, pick, read_text, usage

if TYPE_CHECKING:
    import numpy as np

    from ..evaluate.estimates import Estimate
    from ..evaluate.perplexity import Measurement
    from ..evaluate.protocol import Protocol
    from ..llm import LLM

OPENING = [o for o in LOADING if not str(o.name).startswith(("ctx", "chat_template"))]

# what the estimates are called, what they are multiplied with to be shown, and decimals
LABELS = {
    "ppl": ("Mean PPL(Q)", 1, 6),
    "ppl_base": ("Mean PPL(base)", 1, 6),
    "ppl_correlation": ("Cor(ln(PPL(Q)), ln(PPL(base))), %", 100, 3),
    "ln_ppl_ratio": ("Mean ln(PPL(Q)/PPL(base))", 1, 6),
    "ppl_ratio": ("Mean PPL(Q)/PPL(base)", 1, 6),
    "ppl_difference": ("Mean PPL(Q)-PPL(base)", 1, 6),
    "kld_mean": ("Mean KLD", 1, 6),
    "kld_maximum": ("Maximum KLD", 1, 6),
    "kld_99.9": ("99.9% KLD", 1, 6),
    "kld_99": ("99.0% KLD", 1, 6),
    "kld_95": ("95.0% KLD", 1, 6),
    "kld_90": ("90.0% KLD", 1, 6),
    "kld_median": ("Median KLD", 1, 6),
    "dp_mean": ("Mean Δp, %", 100, 3),
    "dp_rms": ("RMS Δp, %", 100, 3),
    "same_top": ("Same top p, %", 100, 3),
}

OPTIONS = (
    MODEL,
    option("-f", "--file", required=True, type=TEXT_FILE, help="The text, in UTF-8."),
    option("-c", "--ctx-size", "ctx", type=COUNT, default=0,
            help="Tokens of a chunk. 0: 512, for gptq 2048."),
    option("--chunks", type=click.IntRange(-1), default=-1, help="Read so many. -1: the whole text."),
    option("--protocol", type=click.Choice(["llama.cpp", "gptq"]), default="llama.cpp",
            help="gptq is that of the papers on GPTQ, AWQ and AQLM."),
    option("--base", metavar="MODEL", help="Compare with this one, or with MODEL itself on --base-backend."),
    option("--base-backend", type=click.Choice(["numba", "numpy"]),
            help="Backend of the base; by default that of MODEL."),
    *OPENING,
    option("--json", "as_json", is_flag=True, help="For programs."),
)  # fmt: skip


@click.command(params=list(OPTIONS))
def command(
    model: str | None,
    file: Path,
    ctx: int,
    chunks: int,
    protocol: str,
    base: str | None,
    base_backend: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure how well MODEL predicts a text, and how far its predictions are from another model's.

    The distance that the fast kernels keep from exact arithmetic is that of a model from itself:
    --base-backend numpy.

    Ctrl-C ends the measurement, and shows what it found up to then.
    """
    from .. import catalog
    from ..evaluate.protocol import CTX, cut

    text = read_text(file)
    opening = pick(given, OPENING) | {"ctx": ctx or CTX[protocol]}
    about: dict[str, Any] = {"edgeq_version": __version__, "text": str(file)}
    models = [("model", model, given["backend"])]
    if base or base_backend:
        models.append(("base", base or model, base_backend or given["backend"]))
    with ExitStack() as stack, usage():
        readers = []
        for what, name, backend in models:
            with progress() as report:
                path = str(catalog.resolve(name or catalog.default(), report))
            readers.append(stack.enter_context(open_model(path, **opening | {"backend": backend})))
            about |= {what: path, f"{what}_backend": backend}
        with progress() as report:
            report("tokenizing", 0, 1)
            wanted, windows = cut(text, readers[0].tokenizer, protocol, ctx or None, max(chunks, 0) or None)
            measured = watch(readers, wanted, windows, report)
    about |= {"protocol": asdict(measured.protocol) | {"scored": measured.protocol.scored}}
    if as_json:
        estimates = {key: plain(estimate) for key, estimate in measured.estimates.items()}
        click.echo(json.dumps(about | {"estimates": estimates}, indent=1))
    else:
        show_all(about, measured)
    if measured.protocol.chunks < wanted.chunks:
        note(f"stopped after {measured.protocol.chunks} of {wanted.chunks} chunks")
        raise click.Abort


def watch(
    readers: "Sequence[LLM]", wanted: "Protocol", windows: "np.ndarray", report: Progress
) -> "Measurement":
    """Measure the first reader against the second, if there is one, until the end or Ctrl-C."""
    from ..evaluate.perplexity import measure

    measured = None
    report("measuring", 0, wanted.chunks)
    with suppress(KeyboardInterrupt):
        for measured in measure(readers[0], wanted, windows, *readers[1:]):
            report("measuring", measured.protocol.chunks, wanted.chunks, running(measured))
    if measured is None:
        raise KeyboardInterrupt
    return measured


def running(measured: "Measurement") -> str:
    """What has been found so far."""
    ppl = measured.perplexity
    kld = "" if measured.kld is None else f", KLD {measured.kld.mean():.6f}"
    return f"PPL {ppl.value:.4f} ± {ppl.error:.4f}{kld}"


def plain(estimate: "Estimate") -> dict[str, float | None]:
    """An estimate as JSON has it, which has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in estimate._asdict().items()}


def show_all(about: dict[str, Any], measured: "Measurement") -> None:
    """Print how it was measured, and what was found, for people."""
    p = measured.protocol
    for what in ("model", "base"):
        if what in about:
            click.echo(printable(f"{what}: {about[what]} ({about[f'{what}_backend']})"))
    click.echo(printable(f"text: {about['text']}, {p.text_tokens:,} tokens, sha256 {p.text_sha256}"))
    span = f"tokens {p.first_scored} to {p.ctx - 1} of each scored, {p.scored:,} in all"
    click.echo(f"protocol: {p.name}, {p.chunks} chunks of {p.ctx} tokens, {span}, BOS: {p.bos}\n")
    found = table("MEASURE", ">VALUE", ">±")
    for key, estimate in measured.estimates.items():
        label, scale, digits = LABELS[key]
        value, error = ("" if math.isnan(x) else f"{x * scale:.{digits}f}" for x in estimate)
        found.add_row(label, value, error)
    show(found)
