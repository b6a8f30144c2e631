#!/usr/bin/env python3
"""Compare edgeq with llama.cpp on this machine: tokens per second of prompts (pp512) and answers (tg64).

    python tools/bench_peers.py                    the models of the catalog, two threads
    python tools/bench_peers.py -m FILE.gguf -t 4 -r 5

The peer is llama.cpp as llama-cpp-python carries it, compiled for this very CPU (5 to 15 minutes, once) into
an environment of its own in edgeq's cache. The two run in turn, a process each, so that both see the
machine's moods; the table has medians and their ratio. Where the peer's native build crashes, give it other
flags:

    python tools/bench_peers.py --cmake-args="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from edgeq import __version__, catalog
from edgeq.paths import cache_dir

PEER = "llama-cpp-python==0.3.36"
PROMPT, ANSWER = 512, 64

# The peer's side: evaluates the same number of tokens the same way, and prints tokens per second.
RUN_PEER = f"""
import json, random, sys, time
import llama_cpp
path, threads, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
use = dict(n_threads=threads, n_threads_batch=threads)
llm = llama_cpp.Llama(path, n_ctx=1024, n_batch=512, verbose=False, **use)
ids = random.Random(0).sample(range(5, llm.n_vocab()), {PROMPT})
def prompt():
    llm.reset()
    llm.eval(ids)
def answer():
    for token in ids[:{ANSWER}]:
        llm.eval([token])
out = {{}}
for name, count, run in (("pp{PROMPT}", {PROMPT}, prompt), ("tg{ANSWER}", {ANSWER}, answer)):
    samples = []
    for _ in range(repeats + 1):
        llm.reset()
        start = time.perf_counter()
        run()
        samples.append(count / (time.perf_counter() - start))
    out[name] = samples[1:]
print(json.dumps([out, llama_cpp.__version__]))
"""


def main() -> None:
    """Run the comparison, and print it as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--models", nargs="+", default=["smollm2", "gemma3-270m"], metavar="MODEL")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="times that the two take turns")
    parser.add_argument("--cmake-args", default="-DGGML_NATIVE=ON")
    parser.add_argument("--peer-python", type=Path, help="an environment that has llama-cpp-python already")
    given = parser.parse_args()
    peer_python = given.peer_python or build_peer(given.cmake_args)
    rows, version = [], ""
    for model in given.models:
        path = catalog.resolve(model)
        ours: dict[str, list[float]] = {}
        theirs: dict[str, list[float]] = {}
        for turn in range(given.rounds):
            print(f"{path.name}, round {turn + 1} of {given.rounds} ...", file=sys.stderr, flush=True)
            for name, samples in run_edgeq(path, given.threads, given.repetitions).items():
                ours.setdefault(name, []).extend(samples)
            measured, version = run_peer(peer_python, path, given.threads, given.repetitions)
            for name, samples in measured.items():
                theirs.setdefault(name, []).extend(samples)
        for name, samples in ours.items():
            a, b = statistics.median(samples), statistics.median(theirs[name])
            rows.append(f"| {path.stem} | {name} | {a:.0f} | {b:.0f} | {a / b:.2f} |")
    print(f"{cpu_name()}, {given.threads} threads, edgeq {__version__}, Python {platform.python_version()},")
    print(
        f"llama-cpp-python {version} ({given.cmake_args}), {datetime.now(UTC):%Y-%m-%d};"
        " tokens per second, medians\n"
    )
    print("| model | test | edgeq | llama.cpp | ratio |\n|---|---|---:|---:|---:|")
    print("\n".join(rows))


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


def run_edgeq(path: Path, threads: int, repetitions: int) -> dict[str, list[float]]:
    """Tokens per second of each test, from `edgeq bench`."""
    command = [sys.executable, "-m", "edgeq", "bench", "-m", str(path), "-p", str(PROMPT), "-n", str(ANSWER)]
    command += ["-t", str(threads), "-r", str(repetitions), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {test["test"]: test["samples_ts"] for test in json.loads(done.stdout)}


def run_peer(python: Path, path: Path, threads: int, repetitions: int) -> tuple[dict[str, list[float]], str]:
    """The same from the peer, and its version."""
    command = [str(python), "-c", RUN_PEER, str(path), str(threads), str(repetitions)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"the peer ended with status {done.returncode}: {done.stderr[-500:]}\n"
            "Its build may not fit this machine: see --cmake-args in --help"
        )
    tests, version = json.loads(done.stdout.splitlines()[-1])
    return tests, version


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
