"""`edgeq inspect FILE`: what a model file holds."""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FormatError
from ._console import printable, show, size, table

if TYPE_CHECKING:
    from ..tensor import Tensor

LONG_ARRAY, LONG_TEXT = 8, 100


@click.command()
@click.argument("model", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--full", is_flag=True, help="All entries of long arrays and texts.")
@click.option(
    "-c", "--ctx-size", "ctx", type=click.IntRange(1), default=4096, help="For the memory estimate."
)
def command(model: str, as_json: bool, full: bool, ctx: int) -> None:
    """Show the metadata and the tensors of FILE.

    FILE is a .gguf file, a Hugging Face folder, or the name of a model in the cache. Bits per weight, the
    memory that it takes to run, and the hash of its chat template come first.
    """
    from .. import catalog, files

    path = catalog.resolve(model, download=False)
    meta, tensors = files.read(path)
    facts = summarize(path, meta, tensors, ctx)
    values = {key: plain(value, full) for key, value in flatten(meta).items()}
    if as_json:
        rows = [
            {"name": t.name, "format": t.format, "shape": t.shape, "bytes": t.nbytes}
            for t in tensors.values()
        ]
        click.echo(json.dumps({**facts, "metadata": values, "tensors": rows}, indent=1))
        return
    head = table("", "")
    for key, value in facts.items():
        head.add_row(key.replace("_", " "), printable(readable(key, value)))
    keys = table("METADATA", "VALUE")
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        keys.add_row(printable(key), printable(text if full else shorten(text)))
    rows = table("TENSOR", "FORMAT", ">SHAPE", ">BYTES")
    for t in tensors.values():
        rows.add_row(printable(t.name), t.format, " x ".join(map(str, t.shape)), f"{t.nbytes:,}")
    for shown in (head, keys, rows):
        show(shown)


def summarize(path: Path, meta: dict[str, Any], tensors: "dict[str, Tensor]", ctx: int) -> dict[str, Any]:
    """The facts that are asked for first."""
    config = meta.get("config", {})
    template = meta.get("tokenizer.chat_template") or meta.get("tokenizer_config", {}).get("chat_template")
    weights, nbytes = (
        sum(math.prod(t.shape) for t in tensors.values()),
        sum(t.nbytes for t in tensors.values()),
    )
    formats: Counter[str] = Counter()
    for t in tensors.values():
        formats[t.format] += t.nbytes
    return {
        "path": str(path),
        "architecture": meta.get("general.architecture", config.get("model_type")),
        "name": meta.get("general.name"),
        "parameters": weights,
        "bytes": nbytes,
        "bits_per_weight": round(8 * nbytes / weights, 4) if weights else None,
        "formats": dict(formats.most_common()),
        "memory": estimate(path, meta, tensors, ctx),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest()
        if isinstance(template, str)
        else None,
    }


def estimate(
    path: Path, meta: dict[str, Any], tensors: "dict[str, Tensor]", ctx: int
) -> dict[str, int] | None:
    """Bytes of memory that the model takes, or None for one that edgeq does not run."""
    from .. import memory

    try:
        shape = memory.shape(meta, tensors, path)
    except FormatError:
        return None
    ctx = min(ctx, shape.context_length)
    parts = memory.estimate(shape, tensors, backend="numba", ctx=ctx)
    return {"ctx": ctx, **parts._asdict(), "total": parts.total}


def flatten(meta: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of dotted keys of what JSON files nest."""
    flat: dict[str, Any] = {}
    for key, value in meta.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def plain(value: Any, full: bool) -> Any:
    """A value as JSON has it; of a long array the length and the first entries."""
    import numpy as np

    if isinstance(value, np.ndarray | list):
        kept = value if full else value[:LONG_ARRAY]
        first = [x.item() if isinstance(x, np.generic) else x for x in kept]
        return first if len(kept) == len(value) else {"length": len(value), "first": first}
    return value


def readable(key: str, value: Any) -> str:
    """A fact for people."""
    if value is None:
        return "-"
    if key == "parameters":
        return f"{value:,}"
    if key == "bytes":
        return f"{value:,} ({size(value)})"
    if key == "formats":
        return ", ".join(f"{name} {size(n)}" for name, n in value.items())
    if key == "memory":
        parts = (
            f"weights {size(value['weights'])}, program {size(value['program'])}, work {size(value['work'])}"
        )
        return f"{size(value['total'])}: {parts}, context of {value['ctx']} tokens {size(value['cache'])}"
    return str(value)


def shorten(text: str) -> str:
    """The beginning of a text, on one line."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= LONG_TEXT else f"{line[:LONG_TEXT]} ..."
