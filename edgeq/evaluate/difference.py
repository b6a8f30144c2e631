"""What differs between two models: metadata, tensors that only one has, their types, shapes and values.

Models in containers of the same kind are compared as they are, others under GGUF's names. Where a tensor lies
in its file is no difference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import files, formats
from ..convert.source import Source
from ..tensor import Tensor
from .distance import Distance, between, panels, side_by_side

Progress = Callable[[str, int, int], None]


class Entry(NamedTuple):
    """A key of the metadata with both values; a model that does not have it has MISSING."""

    key: str
    a: Any
    b: Any


class Change(NamedTuple):
    """A tensor that differs, or that only one model has; `distance` is that of b from a if shapes agree."""

    name: str
    a: Tensor | None
    b: Tensor | None
    distance: Distance | None


MISSING = object()


@dataclass(frozen=True)
class Difference:
    """What differs between models a and b.

    Attributes
    ----------
    metadata : keys whose values differ.
    tensors : that differ.
    same : number of tensors that do not.
    """

    metadata: list[Entry]
    tensors: list[Change]
    same: int

    def __bool__(self) -> bool:
        return bool(self.metadata or self.tensors)


def difference(a: Path, b: Path, *, progress: Progress | None = None) -> Difference:
    """Compare two models, each a GGUF file or a Hugging Face folder; `progress` is called with (stage, done,
    total), in bytes.
    """
    report = progress or (lambda stage, done, total: None)
    one, two = side_by_side(a, b)
    ours, theirs = flat(one.meta), flat(two.meta)
    metadata = []
    for key in ours | theirs:
        x, y = ours.get(key, MISSING), theirs.get(key, MISSING)
        if not equal(x, y):
            metadata.append(Entry(key, x, y))
    names = list(one.tensors | two.tensors)
    changes = []
    done, total = 0, sum(t.nbytes for source in (one, two) for t in source.tensors.values())
    for name in names:
        report("comparing", done, total)
        pair = one.tensors.get(name), two.tensors.get(name)
        if not _same(one, two, name):
            far = between(two, name, one, name) if all(pair) else None
            changes.append(Change(name, *pair, far))
        done += sum(t.nbytes for t in pair if t is not None)
    report("comparing", total, total)
    return Difference(metadata, changes, len(names) - len(changes))


def flat(meta: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of dotted keys of what JSON files nest."""
    made: dict[str, Any] = {}
    for key, value in meta.items():
        made |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return made


def equal(x: Any, y: Any) -> bool:
    """Whether two values of metadata are the same, and of the same type where both models state it."""
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return x.dtype == y.dtype and np.array_equal(x, y)
    if isinstance(x, np.generic) != isinstance(y, np.generic):  # JSON has neither int32 nor float32
        narrow = np.float32 if isinstance(x, np.float32) or isinstance(y, np.float32) else np.float64
        x, y = (narrow(v).item() if isinstance(v, float | np.floating) else v for v in (x, y))
        x, y = (v.item() if isinstance(v, np.generic) else v for v in (x, y))
    return type(x) is type(y) and bool(x == y)


def _columns(tensor: Tensor) -> np.ndarray:
    """The column that each stored column is."""
    return np.arange(tensor.cols) if tensor.order is None else tensor.order


def _same(one: Source, two: Source, name: str) -> bool:
    """Whether both have the tensor, of one format and shape, with the same bytes in the order that counts."""
    a, b = one.tensors.get(name), two.tensors.get(name)
    if a is None or b is None or (a.format, a.shape) != (b.format, b.shape):
        return False
    if a.parts.keys() != b.parts.keys() or not np.array_equal(_columns(a), _columns(b)):
        return False
    orders = one.rows.get(name), two.rows.get(name)
    pairs = [(a.data.reshape(a.rows, -1), b.data.reshape(b.rows, -1))]
    shared = getattr(formats.get(a.format), "SHARED", "")
    if shared and not np.array_equal(a.parts[shared], b.parts[shared]):
        return False
    pairs += [(part, b.parts[key]) for key, part in a.parts.items() if key != shared]
    for start, stop in panels(a):
        takes = [slice(start, stop) if order is None else order[start:stop] for order in orders]
        if not all(np.array_equal(x[takes[0]], y[takes[1]]) for x, y in pairs):
            return False
        files.release(a.data)
        files.release(b.data)
    return True
