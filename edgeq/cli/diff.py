"""`edgeq diff A B`: what differs between two model files."""

import json
from typing import TYPE_CHECKING, Any

import click

from ..errors import EdgeqError
from ._console import note, printable, progress, show, table
from .inspect import plain, shorten
from .verify import DISTANCE, distances

if TYPE_CHECKING:
    from ..evaluate.difference import Change, Difference, Entry
    from ..tensor import Tensor

SHORT = 8  # entries, or characters, that are shown whole


class Trouble(click.ClickException):
    """What prevents a comparison; diff has exit status 2 for it, since 1 says that there are differences."""

    exit_code = 2


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def command(ctx: click.Context, a: str, b: str, as_json: bool) -> None:
    """Show what differs between the models A and B: metadata, tensors, their types, shapes and values.

    A and B are .gguf files, Hugging Face folders, or names of models. The exit status is that of diff: 0 if
    they are the same, 1 if they differ, 2 in case of trouble.
    """
    from .. import catalog
    from ..evaluate.difference import difference

    try:
        with progress() as report:
            paths = [catalog.resolve(name, download=False) for name in (a, b)]
            found = difference(paths[0], paths[1], progress=report)
    except (EdgeqError, OSError) as error:
        raise Trouble(printable(str(error))) from error
    if as_json:
        click.echo(json.dumps(as_plain(found), indent=1))
    else:
        show_all(found)
    ctx.exit(1 if found else 0)


def show_all(found: "Difference") -> None:
    """Print the differences, for people: - is A, + is B."""
    from ..evaluate.difference import MISSING

    for entry in found.metadata:
        x, y = readable(entry)
        if entry.a is not MISSING:
            click.echo(printable(f"- {entry.key}: {x}"))
        if entry.b is not MISSING:
            click.echo(printable(f"+ {entry.key}: {y}"))
    if found.tensors:
        if found.metadata:
            click.echo()
        rows = table("TENSOR", "A", "B", *DISTANCE)
        for change in found.tensors:
            sides = [brief(tensor) for tensor in (change.a, change.b)]
            cells = distances(change.distance) if change.distance else []
            rows.add_row(printable(change.name), *sides, *cells)
        show(rows)
    differing = f"{len(found.metadata):,} keys and {len(found.tensors):,} tensors differ"
    note(f"{differing if found else 'no difference'}; {found.same:,} tensors are the same")


def brief(tensor: "Tensor | None") -> str:
    """Format and shape, or that there is no such tensor."""
    return "-" if tensor is None else f"{tensor.format} {' x '.join(map(str, tensor.shape))}"


def readable(entry: "Entry") -> tuple[str, str]:
    """Both values on a line each: of long ones what differs first, and types where nothing else does."""
    x, y = entry.a, entry.b
    if hasattr(x, "__len__") and hasattr(y, "__len__") and min(len(x), len(y)) > SHORT:
        unequal = (i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q)
        at = next(unequal, min(len(x), len(y)))
        wide, unit = (60, "characters") if isinstance(x, str) else (3, "entries")
        sides = [f"{len(v):,} {unit}, at {at:,}: {told(v[at : at + wide])}" for v in (x, y)]
    else:
        sides = [told(x), told(y)]
    if sides[0] == sides[1]:
        sides = [
            f"{side} ({getattr(v, 'dtype', type(v).__name__)})" for side, v in zip(sides, (x, y), strict=True)
        ]
    return sides[0], sides[1]


def told(value: Any) -> str:
    """A value of metadata on a line."""
    return shorten(json.dumps(bare(value), ensure_ascii=False, default=str))


def bare(value: Any) -> Any:
    """A value as JSON has it, a long one cut."""
    return plain(value.item() if hasattr(value, "item") and not hasattr(value, "__len__") else value, False)


def as_plain(found: "Difference") -> dict[str, Any]:
    """The differences as JSON has them."""
    from ..evaluate.audit import measures
    from ..evaluate.difference import MISSING

    def tensor(t: "Tensor | None") -> dict[str, Any] | None:
        return None if t is None else {"format": t.format, "shape": t.shape, "bytes": t.nbytes}

    def change(c: "Change") -> dict[str, Any]:
        made = {"name": c.name, "a": tensor(c.a), "b": tensor(c.b)}
        return made | (measures(c.distance) if c.distance else {})

    def entry(e: "Entry") -> dict[str, Any]:
        sides = {"a": e.a, "b": e.b}
        return {"key": e.key} | {side: bare(x) for side, x in sides.items() if x is not MISSING}

    return {
        "same": not found,
        "metadata": [entry(e) for e in found.metadata],
        "tensors": [change(c) for c in found.tensors],
        "same_tensors": found.same,
    }
