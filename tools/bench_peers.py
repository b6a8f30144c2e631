#!/usr/bin/env python3
"""Compare edgeq with llama.cpp on this machine: tokens per second of prompts (pp512) and answers (tg64).

    python tools/bench_peers.py                                    all models of the table
    python tools/bench_peers.py -m llama-1b-q4_0 FILE.gguf -t 4
    python tools/bench_peers.py -m smollm2 --depth 0 4096          after so many tokens, too
    python tools/bench_peers.py -m smollm2 --batch 8               edgeq alone, eight sequences together

Models are fetched or made when they are first wanted (`tools/bench_models.py`; 3.5 GB for all). The peer is
llama.cpp as llama-cpp-python carries it, from the package index, compiled for this very CPU into an
environment of its own in edgeq's cache: 5 to 15 minutes, once, with a C++ compiler. Flash attention is on, as
it is in llama.cpp by itself. The two run in turn, a process each, so that both see the machine's moods; the
table has medians and their ratio. Plain loads take turns with them: no token is made in less time than its
weights are read in, and the table has the ratio that this would give, too. Where the peer's native build
crashes, give it other flags:

    python tools/bench_peers.py --cmake-args="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import bench_models

from edgeq import __version__, files, kernels
from edgeq.cli.bench import cpu
from edgeq.paths import cache_dir

MODELS = ("smollm2", "smollm2-q4_0", "smollm2-q8_0", "gemma3-270m")
MODELS += ("llama-1b-q4_0", "llama-1b-q4_k_m", "llama-1b-q8_0", "llama-1b-tq2_0")
PEER = "llama-cpp-python==0.3.36"
PROMPT, ANSWER = 512, 64
Samples = dict[str, list[float]]  # tokens per second of each test

# The peer's side: evaluates the same number of tokens the same way, and prints tokens per second.
RUN_PEER = f"""
import json, random, sys, time
import llama_cpp
path, threads, repeats, depths = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
use = dict(n_threads=threads, n_threads_batch=threads, n_batch=512, flash_attn=True, verbose=False)
llm = llama_cpp.Llama(path, n_ctx=max(depths) + {PROMPT}, **use)
ids = random.Random(0).choices(range(5, llm.n_vocab()), k=max(depths) + {PROMPT})
def prompt():
    llm.eval(ids[-{PROMPT}:])
def answer():
    for token in ids[-{ANSWER}:]:
        llm.eval([token])
out = {{}}
for depth in depths:
    llm.reset()
    if depth:
        llm.eval(ids[:depth])
    for name, count, run in (("pp{PROMPT}", {PROMPT}, prompt), ("tg{ANSWER}", {ANSWER}, answer)):
        samples = []
        for _ in range(repeats + 1):
            llm.n_tokens = depth  # what comes after is forgotten by the next eval
            start = time.perf_counter()
            run()
            samples.append(count / (time.perf_counter() - start))
        out[name + f" @ d{{depth}}" * (depth > 0)] = samples[1:]
print(json.dumps(out))
"""
DESCRIBE_PEER = r"""
import re, llama_cpp
features = re.findall(r"(\w+) = 1", llama_cpp.llama_print_system_info().decode())
print(f"llama-cpp-python {llama_cpp.__version__} built with {' '.join(features)}")
"""


def main() -> None:
    """Run the comparison, and print it as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--models", nargs="+", default=MODELS, metavar="MODEL")
    parser.add_argument("-t", "--threads", type=int, default=kernels.cores())
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="times that the two take turns")
    parser.add_argument("--depth", type=int, nargs="+", default=[0], help="tokens that come before a test")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1], help="sequences that edgeq decodes together"
    )
    parser.add_argument("--cmake-args", default="-DGGML_NATIVE=ON")
    parser.add_argument("--peer-python", type=Path, help="an environment that has llama-cpp-python already")
    given = parser.parse_args()
    peer = given.peer_python or build_peer(given.cmake_args)
    print(f"{cpu()}, {given.threads} threads, edgeq {__version__}, Python {platform.python_version()},")
    print(f"{output(peer, '-c', DESCRIBE_PEER).strip()},")
    print(f"{datetime.now(UTC):%Y-%m-%d}; tokens per second, medians\n")
    print("| model | test | edgeq | llama.cpp | ratio | memory's limit | as a ratio |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for model in given.models:
        path = bench_models.resolve(model)
        ours: Samples = {}
        theirs: Samples = {}
        loads: list[float] = []
        for turn in range(given.rounds):
            print(f"{path.name}, round {turn + 1} of {given.rounds} ...", file=sys.stderr, flush=True)
            add(ours, run_edgeq(path, given.threads, given.repetitions, given.depth, given.batch))
            loads.append(run_loads(given.threads, given.repetitions))
            add(theirs, run_peer(peer, path, given.threads, given.repetitions, given.depth))
        limit = statistics.median(loads) / read_for_a_token(path)
        for name, samples in ours.items():
            bound = limit if name == f"tg{ANSWER}" else None
            print(row(path.stem, name, samples, theirs.get(name), bound), flush=True)


def row(model: str, test: str, ours: list[float], theirs: list[float] | None, limit: float | None) -> str:
    """A line of the table."""
    a = statistics.median(ours)
    cells = [model, test, f"{a:.0f}", "", "", "" if limit is None else f"{limit:.0f}", ""]
    if theirs is not None:
        b = statistics.median(theirs)
        cells[3:5] = f"{b:.0f}", f"{a / b:.2f}"
        cells[6] = "" if limit is None else f"{limit / b:.2f}"
    return f"| {' | '.join(cells)} |"


def read_for_a_token(path: Path) -> int:
    """Bytes of the weights that every token needs: all but a table of embeddings that is nothing else."""
    tensors = files.read(path)[1]
    apart = {"token_embd.weight"} if "output.weight" in tensors else set()
    return sum(t.nbytes for name, t in tensors.items() if name not in apart)


def add(samples: Samples, more: Samples) -> None:
    """Append the samples of each test."""
    for name, values in more.items():
        samples.setdefault(name, []).extend(values)


def build_peer(cmake_args: str) -> Path:
    """Python of an environment with the peer, built with these flags; built when it is not there yet."""
    folder = cache_dir("peers") / f"{PEER}{cmake_args}".replace(" ", "").replace("/", "_")
    python = folder / "bin" / "python"
    if not (folder / "built").exists():
        print(
            f"building {PEER} with {cmake_args} in {folder}: 5 to 15 minutes, once",
            file=sys.stderr,
            flush=True,
        )
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-binary", "llama-cpp-python", PEER]
        subprocess.run(command, check=True, env=os.environ | {"CMAKE_ARGS": cmake_args})
        (folder / "built").touch()
    return python


def run_edgeq(
    path: Path, threads: int, repetitions: int, depths: Sequence[int], batches: Sequence[int]
) -> Samples:
    """What `edgeq bench` measures."""
    command = [
        "-m",
        "edgeq",
        "bench",
        "-m",
        path,
        "-p",
        PROMPT,
        "-n",
        ANSWER,
        "-t",
        threads,
        "-r",
        repetitions,
    ]
    command += ["-d", ",".join(map(str, depths)), "-b", ",".join(map(str, batches)), "--json"]
    return {test["test"]: test["samples_ts"] for test in json.loads(output(sys.executable, *command))}


def run_loads(threads: int, repetitions: int) -> float:
    """Bytes a second that are loaded from memory, the most of some repetitions."""
    command = "-m", "edgeq", "bench", "--kernels", "--formats", "q8_0"
    found = output(sys.executable, *command, "-t", threads, "-r", repetitions, "--json")
    return 1e9 * json.loads(found)[0]["read_gbs"]


def run_peer(python: Path, path: Path, threads: int, repetitions: int, depths: Sequence[int]) -> Samples:
    """The same from the peer."""
    tests = output(python, "-c", RUN_PEER, path, threads, repetitions, json.dumps(depths))
    return json.loads(tests.splitlines()[-1])


def output(*command: object) -> str:
    """What a program prints."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(
            f"{command[0]} ended with status {done.returncode}. "
            "If that is the peer, its build may not fit this machine: see --cmake-args in --help"
        )
    return done.stdout


if __name__ == "__main__":
    main()
