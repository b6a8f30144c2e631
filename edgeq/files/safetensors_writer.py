"""safetensors, written: the weights of a folder in one file, or in shards with an index. `safetensors` draws
the layout.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from .output import Entry, Progress, durable, parts, reporter, write_tensors

INDEX = "model.safetensors.index.json"


def write(
    folder: Path, entries: Sequence[Entry], *, max_size: int | None = None, progress: Progress | None = None
) -> None:
    """Write model.safetensors to a folder, or shards of at most `max_size` bytes of tensors and an index."""
    shards = parts(entries, max_size)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    total = sum(entry.nbytes for entry in entries)
    report = reporter(progress, total)
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, report)
    if len(shards) > 1:
        where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(
    path: Path, entries: Sequence[Entry], report: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Write a new file; `report` hears of the bytes."""
    with durable(path) as f:
        f.write(_header(entries))
        write_tensors(f, entries, report)


def _header(entries: Sequence[Entry]) -> bytes:
    """Length and JSON, filled up with spaces: the data begins at a multiple of 8 bytes."""
    held: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in entries:
        end = begin + entry.nbytes
        offsets = [begin, end]
        held[entry.name] = {"dtype": entry.type, "shape": entry.shape, "data_offsets": offsets}
        begin = end
    text = json.dumps(held, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
