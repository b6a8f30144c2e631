"""What quantizing a model costs, and what it brings: models measured beside the one they were made from.

Every number is what a command of edgeq prints, run in a process of its own, and can be had again from it:

    edgeq quantize      seconds, the better of two runs unless they are long: the first may compile kernels
    edgeq verify        size, bits per weight, error of each tensor
    edgeq perplexity    perplexity, KL divergence from the base, same top token
    edgeq bench         tokens per second, in turn for all models, several rounds; peak memory

A machine's speed changes by the minute, hence the rounds.
"""

import json
import math
import os
import re
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from .. import catalog
from ..errors import EdgeqError
from ..paths import cache_dir
from ..uniform import kind
from .laboratory import Laboratory, Progress, command, write
from .page import page

ROUNDS, REPETITIONS = 3, 2  # of speed
SHORT = 60.0  # seconds; a quantization that takes less is repeated
# What a number of bits stands for: grids that all methods know how to use.
BITS = {"8": "i8-g64-asym", "4": "i4-g64-asym", "3": "i3-g64-asym", "2": "i2-g32-asym"}
PLAIN, WEIGHED = "rtn", "imatrix"  # the two ways to quantize that are no --method


class Way(NamedTuple):
    """How the base is quantized, and the files that it takes.

    Attributes
    ----------
    method : "rtn", "imatrix", or what `edgeq quantize --method` knows, such as "awq+gptq".
    type : that it makes; None for a method that has its own.
    imatrix : importance matrix, used by "imatrix" only.
    calibration : text that the other methods look at.
    pieces : how many pieces of it.
    """

    method: str
    type: str | None
    imatrix: Path | None
    calibration: Path | None
    pieces: int

    @property
    def name(self) -> str:
        """On the page."""
        return " ".join(filter(None, [self.type, None if self.method == PLAIN else self.method]))

    @property
    def words(self) -> list[str]:
        """Type and options of `edgeq quantize`."""
        type = [self.type] if self.type else []
        if self.method == PLAIN:
            return type
        if self.method == WEIGHED:
            return [*type, "--imatrix", str(self.imatrix)]
        look = ["--calibration", str(self.calibration)] if self.calibration else []
        return [*type, "--method", self.method, *look, "--chunks", str(self.pieces)]

    @property
    def inputs(self) -> list[Path]:
        """Files that the result depends on."""
        used = {PLAIN: None, WEIGHED: self.imatrix}.get(self.method, self.calibration)
        return [used] if used else []


class Candidate(NamedTuple):
    """A model to be measured: its name on the page, its path, and how it was made if that was done here."""

    name: str
    path: Path
    method: str | None = None
    type: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Models beside their base.

    Attributes
    ----------
    about : how and where it was measured: edgeq_version, date, machine, protocol, speed.
    rows : a dictionary of results for each model, as JSON has it; the first is the base.
    """

    about: dict[str, Any]
    rows: list[dict[str, Any]]

    def save(self, path: str | os.PathLike) -> None:
        """Write all of it, as a page where the name ends in .html, else as JSON; the file appears whole or
        not at all.
        """
        path = Path(path)
        write(path, page(self.about, self.rows) if path.suffix == ".html" else self.json())

    def json(self) -> str:
        """All of it, for programs."""
        return json.dumps({"about": self.about, "models": self.rows}, indent=1) + "\n"


def compare(
    base: str | os.PathLike,
    models: Iterable[str | os.PathLike] = (),
    *,
    text: str | os.PathLike,
    types: Sequence[str] = (),
    methods: Sequence[str] = ("rtn",),
    folders: Sequence[str] = (),
    imatrix: str | os.PathLike | None = None,
    calibration: str | os.PathLike | None = None,
    pieces: int = 128,
    protocol: str = "llama.cpp",
    ctx: int | None = None,
    chunks: int | None = 40,
    prompt: int = 512,
    gen: int = 64,
    threads: int | None = None,
    state: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure models beside the one that they were made from.

    Parameters
    ----------
    base : the original: a GGUF file, a Hugging Face folder, or a name of the catalog.
    models : quantizations of it.
    text : file with a text in UTF-8 that is to be predicted.
    types : quantize the base to these, too: ``["q8_0", "i4-g64-asym"]``. The files stay in edgeq's cache.
    methods : how: ``"rtn"`` as `quantize` does it without more, ``"imatrix"`` with importance, or a method
        of `quantize`: ``"gptq"``, ``"awq+gptq"``.
    folders : methods that make no type but their own, once each: ``"aqlm"``.
    imatrix : file with an importance matrix, for "imatrix".
    calibration, pieces : file with a text that those methods look at, not the one that is predicted, and how
        many pieces of it; without one the model makes a text up.
    protocol, ctx, chunks : as in `perplexity`.
    prompt, gen : tokens that are read, and made, to measure speed.
    threads : threads that compute; None takes one for each core.
    state : file where results are kept, so that they are not measured twice; None keeps none.
    progress : called with (stage, done, total, seconds left) before each measurement; measurements then show
        their own progress on stderr.

    Returns
    -------
    Comparison
        ``.rows``, ``.about`` and ``.save("comparison.html")``.
    """
    if WEIGHED in methods and imatrix is None:
        raise ValueError(f"method {WEIGHED} needs an importance matrix")
    weights, look = (None if file is None else Path(file) for file in (imatrix, calibration))
    origin, files = catalog.resolve(base), [catalog.resolve(model) for model in models]
    made = [(method, type) for type in types for method in methods]
    ways = [Way(*pair, weights, look, pieces) for pair in [*made, *((name, None) for name in folders)]]
    if not files and not ways:
        raise ValueError("nothing to compare with the base: name models, or types to make of it")
    common = [] if threads is None else ["-t", str(threads)]
    lab = Laboratory(None if state is None else Path(state), progress)
    count = 1 + len(files) + len(ways)
    lab.expect(quantize=len(ways), verify=count, perplexity=count, bench=count * ROUNDS)
    candidates = [Candidate(n, p) for n, p in zip(names([origin, *files]), [origin, *files], strict=True)]
    places = [place(lab, origin, way) for way in ways]
    for way, path in zip(ways, places, strict=True):
        if not path.exists():  # what cannot be made is said before anything is
            lab.rehearse("quantize", [str(origin), str(path), *way.words, "--dry-run"])
    candidates += [quantized(lab, origin, way, path, common) for way, path in zip(ways, places, strict=True)]
    predict = ["-f", str(text), "--protocol", protocol, "-c", str(ctx or 0), "--chunks", str(chunks or -1)]
    speed = ["-p", str(prompt), "-n", str(gen), "-r", str(REPETITIONS)]
    rows: list[dict[str, Any]] = []
    for c in candidates:
        words = [str(c.path), *(["--against", str(origin)] if rows else [])]
        rows.append(described(c, lab.json("verify", c.name, words, c.path, origin)))
        rows[-1]["commands"] = [command("verify", words)]
    for c, row in zip(candidates, rows, strict=True):
        beside = ["--base", str(origin)] if row is not rows[0] else []
        words = ["-m", str(c.path), *predict, *beside, *common]
        found = lab.json("perplexity", c.name, words, c.path, origin, Path(text))
        row["estimates"], how = found["estimates"], found["protocol"]
        row["commands"].append(command("perplexity", words))
    samples: dict[int, list[Any]] = defaultdict(list)
    for round in range(ROUNDS):
        for i, c in enumerate(candidates):
            words = ["-m", str(c.path), *speed, *common]
            samples[i] += lab.json("bench", c.name, words, c.path, turn=round)
    for i, (c, row) in enumerate(zip(candidates, rows, strict=True)):
        row |= speeds(samples[i])
        row["commands"].append(command("bench", ["-m", str(c.path), *speed, *common]))
    first = samples[0][0]
    about = {
        "edgeq_version": first["edgeq_version"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": first["cpu_info"], "threads": first["n_threads"]},
        "text": str(text),
        "protocol": how,
        "speed": {"prompt": prompt, "gen": gen, "rounds": ROUNDS, "repetitions": REPETITIONS},
    }
    return Comparison(about, rows)


def place(lab: Laboratory, origin: Path, way: Way) -> Path:
    """Where a quantization of the base is, or will be, in edgeq's cache."""
    pieces = [] if way.method in (PLAIN, WEIGHED) else [str(way.pieces)]
    mark = lab.key("quantize", [way.method, way.type or "", *pieces], [origin, *way.inputs], 0)[:16]
    folder = way.type is None or kind(way.type.lower())
    name = f"{names([origin])[0]}-{mark}-{way.type or way.method}"
    return cache_dir("quantized") / (name if folder else f"{name}.gguf")


def quantized(lab: Laboratory, origin: Path, way: Way, path: Path, common: Sequence[str]) -> Candidate:
    """A quantization of the base."""
    inputs = [origin, *way.inputs]
    words = [str(origin), str(path), *way.words, *common]
    if not path.exists():
        for turn in range(2):
            lab.forget("quantize", words, *inputs, turn=turn)
    seconds = lab.run("quantize", way.name, words, *inputs)["seconds"]
    if seconds < SHORT:
        lab.expected["quantize"] += 1
        if path.is_dir() and lab.key("quantize", words, inputs, 1) not in lab.results:
            shutil.rmtree(path)  # only files are replaced
        seconds = min(seconds, lab.run("quantize", way.name, words, *inputs, turn=1)["seconds"])
    return Candidate(way.name, path, way.method, way.type, seconds)


def described(c: Candidate, found: Mapping[str, Any]) -> dict[str, Any]:
    """A model's row, from what verify found."""
    if not found["tensors"]:
        raise EdgeqError(f"{c.path}: {found['problems'][0]}")
    layers: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for tensor in found["tensors"]:
        if len(tensor["shape"]) > 1 and tensor.get("relative_error") is not None:
            layers[layer_of(tensor["name"])].append((tensor["relative_error"], math.prod(tensor["shape"])))
    every = [pair for pairs in layers.values() for pair in pairs]
    formats: Counter[str] = Counter()
    for tensor in found["tensors"]:
        formats[tensor["format"]] += tensor["bytes"]
    return {
        "name": c.name,
        "path": str(c.path),
        "method": c.method,
        "type": c.type,
        "sha256": {file["name"]: file["sha256"] for file in found["files"]},
        "problems": found["problems"],
        "bytes": found["bytes"],
        "parameters": found["parameters"],
        "bits_per_weight": found["bits_per_weight"],
        "formats": dict(formats.most_common()),
        "quantize_seconds": c.seconds,
        "weight_error": together(every),
        "layers": {layer: together(pairs) for layer, pairs in layers.items()},
    }


def layer_of(tensor: str) -> str:
    """The layer that a tensor belongs to: its number, "embedding" or "output"."""
    number = re.search(r"(?:^blk|layers)\.(\d+)\.", tensor)
    return number[1] if number else "embedding" if "embd" in tensor or "embed" in tensor else "output"


def together(errors: Sequence[tuple[float, int]]) -> float | None:
    """Root mean square of relative errors of so many weights."""
    weights = sum(n for _, n in errors)
    return math.sqrt(sum(e * e * n for e, n in errors) / weights) if weights else None


def speeds(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens per second of all rounds, their median and standard deviation, and the peak of memory: the least
    of the rounds', since the first may compile kernels.
    """
    made: dict[str, Any] = {}
    for what, field in (("prefill", "n_prompt"), ("decode", "n_gen")):
        rates = [rate for sample in samples if sample[field] for rate in sample["samples_ts"]]
        made[what] = {"value": statistics.median(rates), "error": statistics.stdev(rates)}
    return made | {"peak_memory": min(sample["peak_memory"] for sample in samples)}


def names(paths: Sequence[Path]) -> list[str]:
    """Short names of models, with the folder where two are called the same."""
    short = [path.stem if path.suffix == ".gguf" else path.resolve().name for path in paths]
    return [
        f"{path.resolve().parent.name}/{name}" if short.count(name) > 1 else name
        for path, name in zip(paths, short, strict=True)
    ]
