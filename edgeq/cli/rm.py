"""`edgeq rm MODEL`: delete a model from the cache."""

import click

from ._console import note, size


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
def command(models: tuple[str, ...]) -> None:
    """Delete models from the cache.

    Files that edgeq did not fetch are never touched.
    """
    from .. import catalog

    for model in models:
        note(f"removed {model}, {size(catalog.remove(model))}")
