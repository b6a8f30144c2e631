"""`edgeq bench`: tokens per second, in llama-bench's terms.

pp512   a prompt of 512 tokens, all at once      tg128   128 tokens, one after the other
pp512 @ d4096   the same after 4096 tokens
"""

import json
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from .. import __version__
from ._console import Progress, progress, size
from ._model import MODEL, open_model

if TYPE_CHECKING:
    from ..arch import Model
    from ..tensor import Tensor


class Counts(click.ParamType):
    """Numbers with commas between them, such as 1,2,4."""

    name = "N[,N...]"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            counts = value if isinstance(value, list) else [int(n) for n in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a number, or several with commas between them", param, ctx)
        if min(counts) < self.least:
            self.fail(f"{min(counts)} is less than {self.least}", param, ctx)
        return counts


@click.command(params=[MODEL])
@click.option("-p", "--n-prompt", "prompts", type=Counts(0), default="512", show_default=True)
@click.option("-n", "--n-gen", "gens", type=Counts(0), default="128", show_default=True)
@click.option("-d", "--n-depth", "depths", type=Counts(0), default="0", show_default=True)
@click.option("-t", "--threads", type=Counts(-1), default="-1", help="-1: one for each core.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option("--backend", type=click.Choice(["numba", "numpy"]), default="numba", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(
    model: str | None,
    prompts: list[int],
    gens: list[int],
    depths: list[int],
    threads: list[int],
    repetitions: int,
    backend: Literal["numba", "numpy"],
    as_json: bool,
) -> None:
    """Measure how fast MODEL reads prompts (pp) and makes tokens (tg)."""
    from .. import catalog, files

    tests = [(p, 0, d) for p in prompts for d in depths if p]
    tests += [(0, n, d) for n in gens for d in depths if n]
    if not tests:
        raise click.UsageError("nothing to measure: both -p and -n are 0")
    with progress() as report:
        path = catalog.resolve(model or catalog.default(), report)
    results = []
    for count in threads:
        with open_model(str(path), threads=count if count > 0 else None, backend=backend) as llm:
            about = describe(path, *files.read(path)) | {"backends": backend}
            for test in tests:
                with progress() as report:
                    samples = measure(llm.model, *test, repetitions, report)
                results.append(about | {"n_threads": llm.model.threads} | rates(*test, samples))
    click.echo(json.dumps(results, indent=1) if as_json else markdown(results))


def describe(path: Path, meta: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
    """The model and the machine."""
    nbytes: Counter[str] = Counter()
    for t in tensors.values():
        nbytes[t.format] += t.nbytes
    architecture = meta.get("general.architecture") or meta["config"].get("model_type")
    parameters = sum(math.prod(t.shape) for t in tensors.values())
    return {
        "edgeq_version": __version__,
        "cpu_info": cpu(),
        "model_filename": str(path),
        "model_type": f"{architecture} {parameters / 1e6:.2f} M {nbytes.most_common(1)[0][0]}",
        "model_size": nbytes.total(),
        "model_n_params": parameters,
    }


def cpu() -> str:
    """The processor's name, or at least its kind."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(
    model: "Model", n_prompt: int, n_gen: int, n_depth: int, repetitions: int, report: Progress
) -> list[int]:
    """Nanoseconds of each repetition; one more goes before and is not counted."""
    import numpy as np

    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, n_depth + n_prompt + n_gen).tolist()
    cache = model.new_cache(len(ids))
    if n_depth:
        model(ids[:n_depth], cache)
    samples = []
    for done in range(repetitions + 1):
        report(name(n_prompt, n_gen, n_depth), done, repetitions + 1)
        cache.truncate(n_depth)
        start = time.perf_counter_ns()
        if n_prompt:
            model(ids[n_depth:], cache)
        else:
            for token in ids[n_depth:]:
                model([token], cache)
        samples.append(time.perf_counter_ns() - start)
    return samples[1:]


def name(n_prompt: int, n_gen: int, n_depth: int) -> str:
    """llama-bench's name of a test."""
    test = f"pp{n_prompt}" if n_prompt else f"tg{n_gen}"
    return f"{test} @ d{n_depth}" if n_depth else test


def rates(n_prompt: int, n_gen: int, n_depth: int, samples: list[int]) -> dict[str, Any]:
    """A test's result."""
    per_second = [1e9 * (n_prompt + n_gen) / ns for ns in samples]
    return {
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "n_depth": n_depth,
        "test": name(n_prompt, n_gen, n_depth),
        "test_time": datetime.now(UTC).isoformat(timespec="seconds"),
        "avg_ns": round(statistics.fmean(samples)),
        "stddev_ns": round(deviation(samples)),
        "avg_ts": statistics.fmean(per_second),
        "stddev_ts": deviation(per_second),
        "samples_ns": samples,
        "samples_ts": per_second,
    }


def deviation(samples: Sequence[float]) -> float:
    """Standard deviation, 0 of a single sample."""
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def markdown(results: list[dict[str, Any]]) -> str:
    """A table as llama-bench prints it."""
    rows = [["model", "size", "params", "backend", "threads", "test", "t/s"], ["---", *["---:"] * 6]]
    for r in results:
        rate = f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}"
        params = f"{r['model_n_params'] / 1e6:.2f} M"
        row = [r["model_type"], size(r["model_size"]), params, r["backends"], r["n_threads"], r["test"], rate]
        rows.append([str(cell) for cell in row])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
