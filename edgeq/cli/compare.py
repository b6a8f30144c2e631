"""`edgeq compare BASE FILES…`: what quantizing a model costs, on one page."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._console import note, orderly, printable, progress, show, size, table
from ._model import COUNT, TEXT_FILE, option, usage

if TYPE_CHECKING:
    from ..evaluate.compare import Comparison


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """ "q4_k_m,q8_0" -> ["q4_k_m", "q8_0"]."""
    return None if value is None else [name.lower() for name in value.split(",") if name]


OPTIONS = (
    option("-f", "--file", "text", required=True, type=TEXT_FILE, help="A text to predict, in UTF-8."),
    option("--types", metavar="TYPE[,TYPE...]", callback=_names,
            help="Quantize BASE to these, too: q4_k_m, i4-g64-asym, all that edgeq quantize knows."),
    option("--bits", metavar="N[,N...]", callback=_names,
            help="The same by bits: 8, 4, 3, 2 are integers in groups, on which all methods can be compared, "
            "i8-g64-asym, i4-g64-asym, i3-g64-asym and i2-g32-asym."),
    option("--methods", metavar="NAME[,NAME...]", callback=_names,
            help="How: rtn rounds, imatrix weighs by importance (GGUF types only), and all that edgeq "
            "quantize --method knows: hqq, awq+gptq. Those that have a type of their own, such as aqlm, make "
            "one model each. Unless given: rtn, with --imatrix both."),
    option("--imatrix", metavar="FILE", type=TEXT_FILE, help="An importance matrix, see edgeq imatrix."),
    option("--calibration", metavar="FILE", type=TEXT_FILE,
            help="A text that methods look at, another than FILE. Unless given, BASE makes one up."),
    option("--pieces", type=click.IntRange(1), default=128, help="How many pieces of 512 tokens of it."),
    option("-c", "--ctx-size", "ctx", type=COUNT, default=0,
            help="Tokens of a chunk. 0: 512, for gptq 2048."),
    option("--chunks", type=click.IntRange(-1), default=40, help="Read so many. -1: the whole text."),
    option("--protocol", type=click.Choice(["llama.cpp", "gptq"]), default="llama.cpp",
            help="gptq is that of the papers on GPTQ, AWQ and AQLM."),
    option("-p", "--n-prompt", "prompt", type=click.IntRange(1), default=512, help="Tokens read, for speed."),
    option("-n", "--n-gen", "gen", type=click.IntRange(1), default=64, help="Tokens made, for speed."),
    option("-t", "--threads", type=click.IntRange(1), help="One for each core unless given."),
    option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default="comparison.html",
            help="The page; beside it go the same numbers as .json, and the state of the work."),
    option("--json", "as_json", is_flag=True, help="For programs."),
)  # fmt: skip


@click.command(
    params=[
        click.Argument(["base"]),
        click.Argument(["models"], nargs=-1, metavar="[FILES]..."),
        *OPTIONS,
    ]
)
def command(
    base: str,
    models: tuple[str, ...],
    types: list[str] | None,
    bits: list[str] | None,
    methods: list[str] | None,
    imatrix: Path | None,
    chunks: int,
    ctx: int,
    output: Path,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure FILES, or quantizations of BASE that are made here, beside the model BASE.

    Size, perplexity, KL divergence from BASE, speed, memory and the error of each layer go into a table, a
    page to look at in a browser, and a JSON file. Each measurement is a command in a process of its own. An
    interrupted comparison goes on where it stopped when it is started again.
    """
    from .. import catalog
    from ..evaluate.compare import BITS, PLAIN, WEIGHED, compare
    from ..quantizers import layerwise

    if output.suffix != ".html":
        raise click.UsageError(f"the page {output} needs a name that ends in .html")
    wanted = [*(types or []), *(BITS.get(n, "") for n in bits or [])]
    if "" in wanted:
        raise click.UsageError(f"--bits are {', '.join(BITS)}")
    methods = methods or ([PLAIN, WEIGHED] if imatrix else [PLAIN])
    folders = [name for name in methods if name.rpartition("+")[2] in layerwise.FOLDERS]
    methods = [name for name in methods if name not in folders]
    if wanted and not methods:
        raise click.UsageError(f"{folders[0]} has a type of its own, without --types or --bits")
    with usage(), progress() as report:
        for name in methods:
            layerwise.check(PLAIN if name == WEIGHED else name)
        for name in (base, *models):
            catalog.resolve(name, report)
    with usage(), orderly():
        found = compare(
            base,
            models,
            types=wanted,
            methods=methods,
            folders=folders,
            imatrix=imatrix,
            ctx=ctx or None,
            chunks=max(chunks, 0) or None,
            state=output.with_suffix(".state.json"),
            progress=announce,
            **given,
        )
    found.save(output)
    found.save(output.with_suffix(".json"))
    if as_json:
        click.echo(found.json(), nl=False)
    else:
        show_all(found)
    note(printable(f"{output} and {output.with_suffix('.json')}"))


def announce(stage: str, done: int, total: int, left: float) -> None:
    """Tell which measurement begins; it shows its own progress."""
    note(printable(f"[{done + 1}/{total}] {stage}, about {timedelta(seconds=round(left))} left"))


def show_all(found: "Comparison") -> None:
    """Print the table, for people."""
    p = found.about["protocol"]
    span = f"tokens {p['first_scored']} to {p['ctx'] - 1} of each scored, {p['scored']:,} in all"
    click.echo(
        printable(f"text: {found.about['text']}, {p['text_tokens']:,} tokens, sha256 {p['text_sha256']}")
    )
    click.echo(f"protocol: {p['name']}, {p['chunks']} chunks of {p['ctx']} tokens, {span}, BOS: {p['bos']}")
    machine = found.about["machine"]
    click.echo(printable(f"machine: {machine['cpu']}, {machine['threads']} threads\n"))
    columns = (
        "SIZE",
        "BITS",
        "PPL",
        "KLD",
        "SAME TOP, %",
        "PROMPT, t/s",
        "ANSWER, t/s",
        "MEMORY",
        "QUANTIZED, s",
    )
    made = table("MODEL", *(f">{column}" for column in columns))
    for row in found.rows:
        e = row["estimates"]
        seconds = row["quantize_seconds"]
        made.add_row(
            printable(row["name"]),
            f"{row['bytes']:,}",
            f"{row['bits_per_weight']:.2f}",
            plus_minus(e["ppl"], 2),
            plus_minus(e.get("kld_mean"), 4),
            plus_minus(e.get("same_top"), 1, 100),
            plus_minus(row["prefill"], 0),
            plus_minus(row["decode"], 1),
            size(row["peak_memory"]),
            "" if seconds is None else f"{seconds:.1f}",
        )
    show(made)
    for row in found.rows:
        if row["problems"]:
            note(printable(f"{row['name']} is not sound: {row['problems'][0]}"))


def plus_minus(estimate: dict[str, float] | None, digits: int, scale: float = 1) -> str:
    """An estimate and its error."""
    if estimate is None:
        return ""
    return f"{estimate['value'] * scale:.{digits}f} ± {estimate['error'] * scale:.{digits}f}"
