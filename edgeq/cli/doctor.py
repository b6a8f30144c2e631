"""`edgeq doctor`: what edgeq finds on this machine."""

import json
import platform
from typing import Any

import click

from ._console import show, size, table

LIBRARIES = ("numpy", "numba", "llvmlite", "safetensors", "tokenizers", "jinja2")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(as_json: bool) -> None:
    """Show what edgeq uses of this machine; a bug report should have it.

    The CPU's instructions, threads, memory, caches, and the versions of libraries.
    """
    facts = examine()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    rows = table("", "")
    for key, value in facts.items():
        rows.add_row(key.replace("_", " "), readable(key, value))
    show(rows)


def examine() -> dict[str, Any]:
    """All facts, by name."""
    from importlib.metadata import version

    from .. import __version__, fetch, memory
    from ..kernels import host
    from ..paths import cache_dir

    return {
        "edgeq": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        **host.describe(),
        "available_memory": memory.available(),
        "cache": str(cache_dir()),
        "cached_models_bytes": fetch.bytes_in(cache_dir("models")),
        "cached_kernels_bytes": fetch.bytes_in(cache_dir("kernels")),
        **{name: version(name) for name in LIBRARIES},
    }


def readable(key: str, value: Any) -> str:
    """A fact for people."""
    if key.endswith(("memory", "bytes")) and isinstance(value, int):
        return size(value)
    if value is None:
        return "no limit"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
