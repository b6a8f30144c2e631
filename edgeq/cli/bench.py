"""`edgeq bench`: tokens per second, in llama-bench's terms.

pp512           a prompt of 512 tokens, all at once
tg128           128 tokens, one after the other
tg128 @ d4096   the same after 4096 tokens
tg128 x8        128 tokens for each of 8 sequences, which go on together; the tokens of all count
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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import click
from click.core import ParameterSource

from .. import __version__
from . import _bench_kernels
from ._console import Progress, progress, size
from ._model import MODEL, open_model, usage

if TYPE_CHECKING:
    from ..arch import Model
    from ..tensor import Tensor


class Test(NamedTuple):
    """What is timed: a prompt of so many tokens, or so many tokens of each sequence, after `depth` others."""

    prompt: int
    gen: int
    depth: int
    sequences: int = 1

    @property
    def name(self) -> str:
        """As llama-bench calls it."""
        name = f"pp{self.prompt}" if self.prompt else f"tg{self.gen}"
        name += f" x{self.sequences}" if self.sequences > 1 else ""
        return f"{name} @ d{self.depth}" if self.depth else name

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return (self.prompt + self.gen) * self.sequences


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


# options that say nothing about kernels, and one that says nothing about a model
OF_MODELS, OF_KERNELS = ("model", "prompts", "gens", "depths", "batches", "backend"), ("formats",)


@click.command(params=[MODEL])
@click.option("-p", "--n-prompt", "prompts", type=Counts(0), default="512", show_default=True)
@click.option("-n", "--n-gen", "gens", type=Counts(0), default="128", show_default=True)
@click.option("-d", "--n-depth", "depths", type=Counts(0), default="0", show_default=True)
@click.option("-b", "--batch", "batches", type=Counts(1), default="1", help="Sequences that go on together.")
@click.option("-t", "--threads", type=Counts(-1), default="-1", help="-1: one for each core.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option("--backend", type=click.Choice(["numba", "numpy"]), default="numba", show_default=True)
@click.option("--kernels", is_flag=True, help="Measure matrix products instead of a model.")
@click.option("--formats", metavar="NAME[,NAME...]", help="Weight formats for --kernels, else all.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    prompts: list[int],
    gens: list[int],
    depths: list[int],
    batches: list[int],
    threads: list[int],
    repetitions: int,
    backend: Literal["numba", "numpy"],
    kernels: bool,
    formats: str | None,
    as_json: bool,
) -> None:
    """Measure how fast MODEL reads prompts (pp) and makes tokens (tg).

    With --kernels: how fast the matrix products of each weight format are, and what share that is of what
    this machine's memory and integer units can do. Takes some seconds a format, and 800 MB of memory.
    """
    for option in ctx.command.params:
        given = ctx.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and option.name in (OF_MODELS if kernels else OF_KERNELS):
            raise click.UsageError(f"{option.opts[0]} {'does not go with' if kernels else 'needs'} --kernels")
    if kernels:
        results = bench_kernels(formats, threads, repetitions)
        rows = _bench_kernels.rows(results)
    else:
        tests = [Test(p, 0, d) for p in prompts for d in depths if p]
        tests += [Test(0, n, d, b) for n in gens for d in depths for b in batches if n]
        if not tests:
            raise click.UsageError("nothing to measure: both -p and -n are 0")
        results = bench_model(model, tests, threads, repetitions, backend)
        rows = model_rows(results)
    click.echo(json.dumps(results, indent=1) if as_json else markdown(rows))


def bench_kernels(formats: str | None, threads: Sequence[int], repetitions: int) -> list[dict[str, Any]]:
    """Results of weight formats, for each number of threads."""
    from .. import formats as known
    from ..kernels import cores

    names = formats.split(",") if formats else known.names()
    with usage():
        for name in names:
            known.get(name)
    results = []
    for count in threads:
        with progress() as report:
            found = _bench_kernels.measure(names, count if count > 0 else cores(), repetitions, report)
        results += [machine() | row for row in found]
    return results


def bench_model(
    model: str | None,
    tests: Sequence[Test],
    threads: Sequence[int],
    repetitions: int,
    backend: Literal["numba", "numpy"],
) -> list[dict[str, Any]]:
    """Results of a model's tests, for each number of threads."""
    from .. import catalog, files, memory

    with progress() as report:
        path = catalog.resolve(model or catalog.default(), report)
    results = []
    for count in threads:
        with open_model(str(path), threads=count if count > 0 else None, backend=backend) as llm:
            about = machine() | describe(path, *files.read(path)) | {"backends": backend}
            for test in tests:
                with progress() as report:
                    samples = measure(llm.model, test, repetitions, report)
                used = {"n_threads": llm.model.threads, "peak_memory": memory.peak()}
                results.append(about | used | rates(test, samples))
    return results


def machine() -> dict[str, Any]:
    """What computes."""
    return {"edgeq_version": __version__, "cpu_info": cpu()}


def describe(path: Path, meta: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
    """The model."""
    nbytes: Counter[str] = Counter()
    for t in tensors.values():
        nbytes[t.format] += t.nbytes
    architecture = meta.get("general.architecture") or meta["config"].get("model_type")
    parameters = sum(math.prod(t.shape) for t in tensors.values())
    return {
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


def measure(model: "Model", test: Test, repetitions: int, report: Progress) -> list[int]:
    """Nanoseconds of each repetition; one more goes before and is not counted."""
    import numpy as np

    shape = test.sequences, test.depth + test.prompt + test.gen
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, shape)
    before, after = ids[:, : test.depth].tolist(), ids[:, test.depth :].tolist()
    caches = [model.new_cache(shape[1]) for _ in before]
    report(test.name, 0, repetitions + 1)
    if test.depth:
        for sequence, cache in zip(before, caches, strict=True):
            model(sequence, cache)
    samples = []
    for done in range(repetitions + 1):
        report(test.name, done, repetitions + 1)
        for cache in caches:
            cache.truncate(test.depth)
        start = time.perf_counter_ns()
        if test.prompt:
            model(after[0], caches[0])
        elif test.sequences == 1:
            for token in after[0]:
                model([token], caches[0])
        else:
            for tokens in zip(*after, strict=True):
                model.step(tokens, caches)
        samples.append(time.perf_counter_ns() - start)
    return samples[1:]


def rates(test: Test, samples: list[int]) -> dict[str, Any]:
    """A test's result."""
    per_second = [1e9 * test.tokens / ns for ns in samples]
    return {
        "n_prompt": test.prompt,
        "n_gen": test.gen,
        "n_depth": test.depth,
        "n_sequences": test.sequences,
        "test": test.name,
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


def model_rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Results of a model as the rows that llama-bench prints."""
    rows = [["model", "size", "params", "backend", "threads", "test", "t/s"], ["---", *["---:"] * 6]]
    for r in results:
        rate = f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}"
        params = f"{r['model_n_params'] / 1e6:.2f} M"
        row = [r["model_type"], size(r["model_size"]), params, r["backends"], r["n_threads"], r["test"], rate]
        rows.append([str(cell) for cell in row])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of these rows, the first column aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
