"""`edgeq lora merge` and `edgeq lora convert`: what can be done with an adapter besides running it."""

from pathlib import Path

import click

from ._console import orderly, progress
from ._model import adapters, option, usage

OUT = click.Path(path_type=Path)


@click.group()
def command() -> None:
    """Merge and convert LoRA adapters; `edgeq run --lora` runs them."""


@command.command(
    params=[
        click.Argument(["model"]),
        click.Argument(["lora"], nargs=-1, required=True, metavar="ADAPTER[:SCALE]...", callback=adapters),
        option("-o", "--output", "out", type=OUT, required=True, metavar="FILE", help="The GGUF file."),
        option(
            "--type",
            metavar="TYPE",
            help="Of the matrices that change. Each keeps its own without, whose steps may be larger than "
            "what was learned: then it is lost. q8_0 keeps it.",
        ),
    ]
)
def merge(model: str, lora: list[tuple[str, float]], out: Path, type: str | None) -> None:
    """Write MODEL with adapters in its weights."""
    from ..train.merge import merge as merge_adapters

    with usage(), progress() as report, orderly():
        for path in merge_adapters(model, lora, out, type=type and type.lower(), progress=report):
            click.echo(path)


@command.command(
    params=[
        click.Argument(["model"]),
        click.Argument(["adapter"]),
        option("-o", "--output", "out", type=OUT, required=True, metavar="PATH",
                help="A GGUF file if it ends so, else a PEFT folder."),
    ]
)  # fmt: skip
def convert(model: str, adapter: str, out: Path) -> None:
    """Write ADAPTER, which belongs to MODEL, for llama.cpp or for PEFT."""
    from ..train.merge import convert as convert_adapter

    convert_adapter(model, adapter, out)
    click.echo(out)
