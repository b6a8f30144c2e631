"""`edgeq pull MODEL`: fetch a model into the cache."""

import click

from ._console import note, progress


@click.command()
@click.argument("model")
def command(model: str) -> None:
    """Fetch MODEL into the cache and print its path.

    MODEL is a name of the catalog (`edgeq list`), hf:USER/REPO[:QUANT], or an https address. One of
    the catalog that is there already is checked.
    """
    from .. import catalog
    from ..errors import ModelNotFound

    with progress() as report:
        try:
            path = catalog.resolve(model, download=False)
        except ModelNotFound:
            path = catalog.resolve(model, report)
        else:
            catalog.verify(model, report)
    if entry := catalog.entries().get(model):
        note(f"{model}: license {entry.license}")
    click.echo(path)
