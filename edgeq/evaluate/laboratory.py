"""Commands of edgeq, run in processes of their own, whose results are kept in a file as they come.

A result is kept under what it depends on: contents of files, options, edgeq's version. What was interrupted
goes on where it stopped, and what changed is measured again.
"""

import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import EdgeqError
from ..files.output import durable, whole
from .audit import hashes

# called with (stage, done, total, seconds left)
Progress = Callable[[str, int, int, float], None]

HOME = str(Path(__file__).parents[2])  # of this very edgeq, so that the commands are its own
# Seconds that a command takes, until one was measured.
GUESSES = {"quantize": 10.0, "verify": 5.0, "perplexity": 120.0, "bench": 10.0}


class Laboratory:
    """Runs commands, and knows those that it ran before."""

    def __init__(self, path: Path | None, progress: Progress | None) -> None:
        self.path, self.progress = path, progress
        self.results: dict[str, dict[str, Any]] = read(path) if path else {}
        self.version = execute("--version", [], quiet=True)
        self.digests: dict[Path, str] = {}
        self.expected: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.done = 0

    def expect(self, **counts: int) -> None:
        """How many commands of each verb there will be."""
        self.expected = Counter(counts)

    def json(self, verb: str, name: str, words: Sequence[str], *inputs: Path, turn: int = 0) -> Any:
        """What `edgeq VERB WORDS --json` prints; `inputs` are the files that it depends on."""
        return json.loads(self.run(verb, name, [*words, "--json"], *inputs, turn=turn)["out"])

    def run(self, verb: str, name: str, words: Sequence[str], *inputs: Path, turn: int = 0) -> dict[str, Any]:
        """Output and seconds of `edgeq VERB WORDS`."""
        key = self.key(verb, words, inputs, turn)
        if key not in self.results:
            if self.progress:
                self.progress(f"{verb} {name}", self.done, self.expected.total(), self.time_left())
            start = time.monotonic()
            out = execute(verb, words, quiet=self.progress is None)
            self.results[key] = {"seconds": time.monotonic() - start, "out": out}
            if self.path:
                write(self.path, json.dumps(self.results))
        self.done += 1
        self.seconds[verb].append(self.results[key]["seconds"])
        return self.results[key]

    def rehearse(self, verb: str, words: Sequence[str]) -> None:
        """Run `edgeq VERB WORDS`, which measures nothing; EdgeqError when it fails."""
        execute(verb, words, quiet=True)

    def forget(self, verb: str, words: Sequence[str], *inputs: Path, turn: int = 0) -> None:
        """Measure that again."""
        self.results.pop(self.key(verb, words, inputs, turn), None)

    def key(self, verb: str, words: Sequence[str], inputs: Sequence[Path], turn: int) -> str:
        """Hash of all that a result depends on."""
        for path in inputs:
            if path not in self.digests:
                found = hashes(path, lambda stage, done, total: None)
                self.digests[path] = "".join(file.sha256 for file in found)
        depends = [self.version, verb, list(words), [self.digests[path] for path in inputs], turn]
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()

    def time_left(self) -> float:
        """Seconds that the rest will take, by those of the commands that were run."""
        left = 0.0
        for verb, count in self.expected.items():
            known = self.seconds[verb]
            left += (count - len(known)) * (statistics.fmean(known) if known else GUESSES[verb])
        return left


def execute(verb: str, words: Sequence[str], *, quiet: bool) -> str:
    """Run a command of edgeq, and return what it printed; EdgeqError when it failed."""
    path = [HOME, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "edgeq", verb, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )
    if done.returncode == 0 or (verb == "verify" and done.returncode == 1 and done.stdout):
        return done.stdout
    said = f": {done.stderr.strip().splitlines()[-1]}" if done.stderr and done.stderr.strip() else ""
    how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
    raise EdgeqError(f"{command(verb, words)} {how}{said}")


def command(verb: str, words: Iterable[str]) -> str:
    """What to type for it."""
    return shlex.join(["edgeq", verb, *words])


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results that were kept; none if there is no such file, EdgeqError if it is something else."""
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        sound = all({"seconds", "out"} <= result.keys() for result in kept.values())
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        raise EdgeqError(f"{path} does not hold results of edgeq compare. Name another output")
    return kept


def write(path: Path, text: str) -> None:
    """Write a file, which appears whole or not at all."""
    data = text.encode()
    with whole(path, nbytes=len(data)) as (unfinished,), durable(unfinished) as f:
        f.write(data)
