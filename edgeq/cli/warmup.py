"""`edgeq warmup`: compile the kernels ahead."""

import click

from ._console import note, progress


@click.command()
def command() -> None:
    """Compile all kernels now, so that no answer waits for them."""
    from .. import kernels

    with progress() as report:
        kernels.warmup(report)
    note("all kernels are compiled")
