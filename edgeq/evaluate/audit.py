"""Whether a file is what it should be: a verdict on its structure, its numbers, and what became of the
original.

    structure    the container is sound, and holds the tensors of its architecture in the right shapes, and no
                 token that the embedding has no row for
    numbers      all finite, and few groups dead or saturated, see `health`
    error        distance of each tensor from the original's, see `distance`

Some dead or saturated groups are ordinary: tokens that no text has, small groups beside large ones. Where
they are a tenth of a matrix something went wrong.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from .. import arch, files, formats, tokenizer
from ..arch.weights import Weights
from ..convert.source import Source
from ..errors import FormatError
from ..tensor import Tensor
from .distance import Distance, between, counterpart, side_by_side
from .health import Health, health

Progress = Callable[[str, int, int], None]

TOLERATED, ORDINARY = 0.1, 0.001  # shares of a matrix's groups that may be dead, or saturated: at all, unsaid
# Normal weights, in groups of 32 between whose extremes n levels lie evenly, get a relative error of
# 1.2 / (n - 1). Six times that is no rounding, nor is what zeros would do as well.
FAR, FARTHEST, FAR_FOR_FLOATS = 7.2, 1.0, 0.01


class File(NamedTuple):
    """A file of a model."""

    name: str
    bytes: int
    sha256: str


class Finding(NamedTuple):
    """A tensor, and what was found; `distance` is that from the original's, if there is such a tensor."""

    tensor: Tensor
    health: Health
    distance: Distance | None


@dataclass
class Audit:
    """The verdict on a model.

    Attributes
    ----------
    path : of the model.
    files : that it consists of.
    findings : by name of the tensor.
    problems : what is wrong, a sentence each.
    far : tensors that are not what rounding makes of the original's, a sentence each. A method that changes
        weights but not the function that they compute has such tensors, too.
    remarks : what is worth knowing, but may be as it should.
    """

    path: Path
    files: list[File]
    findings: dict[str, Finding] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    far: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.far


def audit(
    path: Path, original: Path | None = None, *, sha256: str | None = None, progress: Progress | None = None
) -> Audit:
    """Look at all of a model.

    Parameters
    ----------
    path : a GGUF file, or a Hugging Face folder.
    original : what it was made from, in either container, or None.
    sha256 : what the hash of the file should be, or None.
    progress : called with (stage, done, total), in bytes.

    Raises
    ------
    FormatError : when the original is unsound; all that is wrong with `path` is in the result.
    """
    report = progress or (lambda stage, done, total: None)
    found = Audit(path, hashes(path, report))
    if sha256 is not None and [file.sha256 for file in found.files] != [sha256.lower()]:
        found.problems.append(f"the sha256 is not {sha256.lower()}")
    try:
        meta, tensors = files.read(path)
    except FormatError as error:
        found.problems.append(str(error))
        return found
    found.problems += _structure(path, meta, tensors, found.remarks)
    source, theirs = Source(path, meta, tensors, rows={}), None
    if original is not None:
        files.read(original)  # what is wrong with it is no verdict on the model
        try:
            source, theirs = side_by_side(path, original)
        except FormatError as error:
            found.problems.append(f"no comparison with the original: {error}")
    done, total = 0, sum(t.nbytes for t in source.tensors.values())
    for name, tensor in source.tensors.items():
        report("checking tensors", done, total)
        other = counterpart(name, theirs.tensors) if theirs else None
        far = between(source, name, theirs, other) if theirs and other else None
        found.findings[name] = Finding(tensor, health(tensor), far)
        done += tensor.nbytes
    report("checking tensors", total, total)
    _judge_health(found)
    if theirs is not None:
        _judge_distances(found, theirs)
    return found


def hashes(path: Path, report: Progress) -> list[File]:
    """The files of a model: all in a folder, the parts of a split one, or the one."""
    if path.is_dir():
        names = [p for p in path.iterdir() if not p.name.startswith(".")]
    else:
        part = files.gguf.PART_NAME.fullmatch(path.name)
        names = [*path.parent.glob(f"*-of-{part[3]}.gguf")] if part else [path]
        names = [p for p in names if not part or p.name.startswith(part[1])]
    sizes = {p: p.stat().st_size for p in sorted(names) if p.is_file()}
    found, done, total = [], 0, sum(sizes.values())
    for p, size in sizes.items():
        digest = hashlib.sha256()
        with open(p, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
                done += len(block)
                report("hashing", min(done, total), total)
        found.append(File(p.name, size, digest.hexdigest()))
    return found


def _structure(
    path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], remarks: list[str]
) -> list[str]:
    """Problems of what holds a model together."""
    problems = []
    tokens = 0
    try:
        words = tokenizer.from_huggingface(path) if path.is_dir() else tokenizer.from_gguf(meta, path)
        tokens = words.vocab_size
    except FormatError as error:
        problems.append(str(error))
    if not tensors:
        remarks.append("it holds no tensors")
        return problems
    # a backend that computes nothing: the network of the architecture asks for all of its tensors
    idle = SimpleNamespace(
        linear=lambda *args, **options: SimpleNamespace(), embedding=lambda tensor: SimpleNamespace()
    )
    try:
        module, meta, tensors = arch.identify(meta, tensors, path)
        rows = module.network(meta, Weights(tensors, idle, path)).config.vocab_size  # type: ignore[arg-type]
    except FormatError as error:
        (remarks if error.where == "architecture" else problems).append(str(error))
        return problems
    if tokens > rows:
        problems.append(f"the vocabulary has {tokens:,} tokens, the embedding {rows:,} rows")
    return problems


def _judge_health(found: Audit) -> None:
    """Tell of tensors that are ill."""
    for name, (_, state, _) in found.findings.items():
        if state.not_finite:
            found.problems.append(f"{name}: {state.not_finite:,} numbers are not finite")
        for what in ("dead", "saturated"):
            count = getattr(state, what)
            if count > ORDINARY * state.groups:
                told = f"{name}: {count:,} of {state.groups:,} groups are {what}"
                (found.problems if count > TOLERATED * state.groups else found.remarks).append(told)


def _judge_distances(found: Audit, theirs: Source) -> None:
    """Tell of tensors that are not what rounding makes of the original's."""
    for name, (tensor, state, far) in found.findings.items():
        other = counterpart(name, theirs.tensors)
        if other is None:
            found.remarks.append(f"{name}: the original has no such tensor")
        elif far is None:
            shapes = f"{tensor.shape}, in the original {theirs.tensors[other].shape}"
            found.problems.append(f"{name}: its shape is {shapes}")
        elif not state.not_finite and not far.relative <= (limit := explained(tensor)):
            error = f"{100 * far.relative:.3g} % from the original"
            found.far.append(f"{name}: {error}, rounding to {tensor.format} explains {100 * limit:.3g} %")
    for name in sorted(theirs.tensors.keys() - found.findings.keys()):
        found.problems.append(f"{name}: the original has it, this model does not")


def explained(tensor: Tensor) -> float:
    """The largest relative error that rounding to a tensor's format explains."""
    if not tensor.nbytes:
        return 0.0
    if tensor.format in formats.VECTORS:
        return FARTHEST
    _, grid = formats.unpack(tensor, 0, 1)
    return FAR_FOR_FLOATS if grid is None else min(FARTHEST, FAR / (len(grid.levels) - 1))


def plain(found: Audit) -> dict[str, Any]:
    """An audit as JSON has it."""
    rows = []
    for name, (tensor, state, far) in found.findings.items():
        row = {"name": name, "format": tensor.format, "shape": tensor.shape, "bytes": tensor.nbytes}
        rows.append(row | state._asdict() | (measures(far) if far is not None else {}))
    weights = sum(math.prod(f.tensor.shape) for f in found.findings.values())
    nbytes = sum(f.tensor.nbytes for f in found.findings.values())
    return {
        "path": str(found.path),
        "sound": found.sound,
        "problems": found.problems,
        "far": found.far,
        "remarks": found.remarks,
        "files": [file._asdict() for file in found.files],
        "bytes": sum(file.bytes for file in found.files),
        "parameters": weights,
        "bits_per_weight": 8 * nbytes / weights if weights else None,
        "tensors": rows,
    }


def measures(far: Distance) -> dict[str, float | None]:
    """A distance as JSON has it, which knows neither NaN nor infinity."""
    named = {
        "relative_error": far.relative,
        "sqnr_db": far.sqnr,
        "max_error": far.maximum,
        "cosine": far.cosine,
    }
    return {key: value if math.isfinite(value) else None for key, value in named.items()}
