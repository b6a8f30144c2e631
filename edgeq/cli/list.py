"""`edgeq list`: the catalog, and what is in the cache."""

import click

from ._console import printable, show, size, table


@click.command()
def command() -> None:
    """Show the catalog, and the models on this machine."""
    from .. import catalog

    rows = table("NAME", ">SIZE", "HERE", "LICENSE", "DESCRIPTION")
    here = {model.name: model for model in catalog.installed()}
    for entry in catalog.entries().values():
        mark = "yes" if catalog.local(entry.name) else ""
        rows.add_row(entry.name, size(entry.size), mark, entry.license, entry.description)
        here.pop(entry.name, None)
    for model in here.values():
        rows.add_row(printable(model.name), size(model.size), "yes", "", "")
    show(rows)
