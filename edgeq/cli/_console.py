"""The terminal: progress on stderr, text that is safe to show, sizes that are easy to read."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import click

PATIENCE = 0.5  # seconds that a stage may take before it is shown
LOG_EVERY = 15.0  # seconds between lines about it where there is no terminal
CONTROLS = {c: None for c in (*range(32), *range(127, 160)) if c not in b"\t\n"}


class Progress(Protocol):
    """What is told how far a stage has come, and if need be what it found so far."""

    def __call__(self, stage: str, done: int, total: int, found: str = "") -> None: ...


def printable(text: str) -> str:
    """Text without the control characters by which a file, or a model, could steer the terminal."""
    return text.translate(CONTROLS)


def size(nbytes: int) -> str:
    """A number of bytes for people."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def note(text: str) -> None:
    """A line on stderr."""
    click.echo(text, err=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """A callback (stage, done, total) that shows the stages that take a while."""
    shown: Stage | None = None

    def report(stage: str, done: int, total: int, found: str = "") -> None:
        nonlocal shown
        if shown is None or shown.name != stage:
            if shown is not None:
                shown.close()
            shown = Stage(stage)
        shown.update(done, total, found)

    try:
        yield report
    finally:
        if shown is not None:
            shown.close()


@contextmanager
def orderly() -> Iterator[None]:
    """Let a signal that ends the program do so like an error: unfinished output is removed first."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stage:
    """Something that goes on: a bar on a terminal, lines in a log, nothing if it is over soon."""

    def __init__(self, name: str) -> None:
        self.name, self.done, self.total, self.found = name, 0, 0, ""
        self.bar: Any = None
        self.start = time.monotonic()
        self.logged = 0.0  # when the latest line was written
        self.lock = threading.Lock()
        # the stage itself may be silent for long: its first step can take seconds
        self.timer = threading.Timer(PATIENCE, self.show)
        self.timer.daemon = True
        self.timer.start()

    def show(self) -> None:
        """Begin to be seen."""
        with self.lock:
            if self.done >= self.total:
                return
            if not sys.stderr.isatty():
                self.log()
                return
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}")
            self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self.bar.add_task(self.name, completed=self.done, total=self.total, amount=self.amount())
            self.bar.start()

    def update(self, done: int, total: int, found: str) -> None:
        """So far it has come."""
        with self.lock:
            self.done, self.total, self.found = done, total, found
            if self.bar is not None:
                self.bar.update(0, completed=done, total=total, amount=self.amount())
            elif self.logged and done < total and time.monotonic() - self.logged > LOG_EVERY:
                self.log()
        if done >= total:
            self.close()

    def close(self) -> None:
        """It is over."""
        self.timer.cancel()
        with self.lock:
            self.done = self.total
            if self.bar is not None:
                self.bar.stop()
                self.bar = None

    def log(self) -> None:
        """Write a line, for where there is no terminal."""
        left = ""
        if self.logged and self.done:
            seconds = (time.monotonic() - self.start) * (self.total - self.done) / self.done
            left = f", {timedelta(seconds=round(seconds))} left"
        note(f"{self.name}, {self.amount()}{left} ...")
        self.logged = time.monotonic()

    def amount(self) -> str:
        """How much is done, and found."""
        if self.total > 1 << 20:
            amount = f"{self.done / 2**20:.1f} / {self.total / 2**20:.1f} MiB"
        else:
            amount = f"{self.done} / {self.total}"
        return f"{amount}, {self.found}" if self.found else amount


def table(*columns: str) -> Any:
    """A plain table with these headings, if any is not empty; ">" before one sets its column to the right."""
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(box=SIMPLE, show_edge=False, pad_edge=False, show_header=any(columns))
    for heading in columns:
        made.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left")
    return made


def show(table: Any) -> None:
    """Print a table to stdout; what is not a terminal gets all of it, however wide."""
    from rich.console import Console

    Console(highlight=False, width=None if sys.stdout.isatty() else 1000).print(table)
