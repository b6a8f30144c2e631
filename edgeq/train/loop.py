"""The loop: batches to gradients to steps, with checkpoints from which a run goes on to the bit.

A step depends on the weights, on what the optimizer remembers, and on its own number: the number chooses the
batch, the learning rate and what dropout leaves out. So these are all that a checkpoint holds:

    checkpoint-N/state.safetensors    weights, and "m.NAME", "v.NAME" of the optimizer
    checkpoint-N/state.json           what makes the run what it is, and the losses so far
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from .. import formats
from ..errors import EdgeqError
from ..files import safetensors, safetensors_writer, strict_json
from ..files.output import whole
from ..files.source import Allowance
from . import optim, tape
from .adapter import entry
from .backend import Network
from .data import Batch
from .tape import Numbers, Var

LOGITS = 1 << 20  # that are in memory at once
HELD = 1 << 12  # tokens whose loss alone is computed together
STATE, STEPS = "state.safetensors", "state.json"

# logits (n, vocab), targets (n,), weights (n,), places (n,) of these rows in the batch -> a number
Loss = Callable[[Numbers, np.ndarray, np.ndarray, np.ndarray], Numbers]


class Progress(Protocol):
    """What is told how far a stage has come, and what it found so far."""

    def __call__(self, stage: str, done: int, total: int, found: str = "") -> None: ...


class Batches(Protocol):
    """What a run reads: a batch for each number from 0, and a number that other data would hardly have."""

    def batch(self, number: int) -> Batch: ...

    def fingerprint(self) -> int: ...


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes
    ----------
    steps : changes of the weights.
    batch, accumulate : sequences that are computed together, and how often for one step.
    rate, warmup, floor : highest learning rate, steps that rise to it, and what is left of it at the end.
    optimizer, decay : which one, and its weight decay.
    clip : longest gradient.
    seed : of everything random.
    save_every : steps between checkpoints.
    """

    steps: int
    batch: int = 1
    accumulate: int = 1
    rate: float = 2e-4
    warmup: int = 0
    floor: float = 0.1
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.optimizer not in optim.OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}, expected {' or '.join(optim.OPTIMIZERS)}")


class Point(NamedTuple):
    """A step: its number from 1, the mean loss of its learned tokens, the rate, the gradient's length before
    it was clipped, tokens that were read, and seconds that it took.
    """

    step: int
    loss: float
    rate: float
    norm: float
    tokens: int
    seconds: float


def likelihood(logits: Numbers, targets: np.ndarray, weights: np.ndarray, rows: np.ndarray) -> Numbers:
    """The loss of a language model."""
    return tape.cross_entropy(logits, targets, weights)


def gradients(network: Network, batch: Batch, total: int, loss: Loss = likelihood) -> float:
    """Add the gradients of a batch's loss to what learns; returns the sum of its losses, divided by `total`.

    Logits are made for some rows at a time, and only for those that are learned.
    """
    hidden = network.hidden(batch.ids)
    h = tape.value(hidden)
    back, found = np.zeros_like(h), 0.0
    places, targets = np.flatnonzero(batch.learned), batch.targets.reshape(-1)
    step = max(1, LOGITS // network.config.vocab_size)
    for start in range(0, len(places), step):
        rows = places[start : start + step]
        part = Var(h[rows])
        weights = np.full(len(rows), 1 / total, h.dtype)
        sum_of_rows = loss(network.head(part), targets[rows], weights, rows)
        tape.backward(sum_of_rows)
        assert part.grad is not None
        back[rows] = part.grad
        found += float(sum_of_rows.value)
    if isinstance(hidden, Var):
        tape.backward(hidden, back)
    return found


def mean_loss(network: Network, ids: np.ndarray, length: int) -> float:
    """Mean loss of a text's tokens, int (n * length + 1,), in stretches that are each read by themselves."""
    sequences, loss = max(1, HELD // length), 0.0
    inputs, targets = (part.reshape(-1, length) for part in (ids[:-1], ids[1:]))
    for start in range(0, len(inputs), sequences):
        rows = slice(start, start + sequences)
        hidden = tape.value(network.hidden(inputs[rows]))
        wanted = targets[rows].reshape(-1)
        ones = np.ones(len(wanted), np.float32)
        loss += float(tape.value(tape.cross_entropy(tape.value(network.head(hidden)), wanted, ones)))
    return loss / targets.size


class Loop:
    """A run.

    Parameters
    ----------
    network, learned : what computes, and what of it changes, by name.
    order : the batches.
    options : how.
    folder : where checkpoints belong.
    begin : called with (step, turn, batch) before each batch.
    loss : of some rows of logits.
    about : what else makes the run what it is; a checkpoint of one that differs in it is not gone on with.

    Attributes
    ----------
    curve : a Point for each step that was taken.
    """

    def __init__(
        self,
        network: Network,
        learned: Mapping[str, Var],
        order: Batches,
        options: Options,
        folder: Path,
        *,
        begin: Callable[[int, int, Batch], None] = lambda step, turn, batch: None,
        loss: Loss = likelihood,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.network, self.learned, self.order, self.options = network, learned, order, options
        self.folder, self.begin, self.loss = folder, begin, loss
        self.weights = {name: var.value for name, var in learned.items()}
        self.optimizer: optim.Optimizer = optim.OPTIMIZERS[options.optimizer](decay=options.decay)
        self.curve: list[Point] = []
        identity = {**asdict(options), **about, "examples": order.fingerprint()}
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # as a checkpoint gives it back

    def run(self, progress: Progress | None = None, saved: Callable[[], None] = lambda: None) -> None:
        """Take the steps that are left; `saved` is called after each checkpoint."""
        o = self.options
        began, tokens = time.monotonic(), 0
        while (done := len(self.curve)) < o.steps:
            self.curve.append(self.step(done))
            tokens += self.curve[-1].tokens
            if progress:
                recent = np.mean([p.loss for p in self.curve[-10:]])
                speed = tokens / (time.monotonic() - began)
                progress("training", done + 1, o.steps, f"loss {recent:.3f}, {speed:.0f} tokens/s")
            if (done + 1) % o.save_every == 0 or done + 1 == o.steps:
                self.save()
                saved()

    def step(self, number: int) -> Point:
        """Take a step."""
        o, start = self.options, time.monotonic()
        batches = [self.order.batch(number * o.accumulate + turn) for turn in range(o.accumulate)]
        total = sum(int(b.learned.sum()) for b in batches)
        loss = 0.0
        for turn, batch in enumerate(batches):
            self.begin(number, turn, batch)
            loss += gradients(self.network, batch, total, self.loss)
        found = {name: var.grad for name, var in self.learned.items() if var.grad is not None}
        for var in self.learned.values():
            var.node.grad = None
        length = optim.clip(found, o.clip)
        if not np.isfinite(loss + length):
            raise EdgeqError(
                f"the loss of step {number + 1} is {loss}, its gradient {length}: lower the rate"
            )
        rate = optim.rate(number, o.steps, o.rate, o.warmup, o.floor)
        self.optimizer.step(self.weights, found, rate)
        tokens = sum(b.ids.size for b in batches)
        return Point(number + 1, loss, rate, length, tokens, time.monotonic() - start)

    def save(self) -> None:
        """Write a checkpoint, and remove those before it."""
        arrays = self.weights | self.optimizer.state
        entries = [entry(name, "F32", array) for name, array in arrays.items()]
        told = {"run": self.identity, "curve": [list(point) for point in self.curve]}
        path = self.folder / f"checkpoint-{len(self.curve)}"
        if path.exists():
            shutil.rmtree(path)
        with whole(path, nbytes=sum(e.nbytes for e in entries)) as (new,):
            new.mkdir()
            safetensors_writer.write_file(new / STATE, entries)
            (new / STEPS).write_text(json.dumps(told) + "\n")
        for old in checkpoints(self.folder)[:-1]:
            shutil.rmtree(old)

    def resume(self) -> bool:
        """Go on from the latest checkpoint, if there is one; EdgeqError if it is of another run."""
        if not (found := checkpoints(self.folder)):
            return False
        path, allowance = found[-1], Allowance()
        told: dict[str, Any] = strict_json.read(path / STEPS, allowance)
        if changed := [key for key, value in self.identity.items() if told["run"].get(key) != value]:
            raise EdgeqError(
                f"{path} was made with another {' and '.join(changed)}: give the same, or a new folder"
            )
        tensors = safetensors.read(path / STATE, allowance, mmap=False)
        if missing := self.weights.keys() ^ {n for n in tensors if n[:2] not in ("m.", "v.")}:
            raise EdgeqError(f"{path} is of another model or adapter: {sorted(missing)[0]} is in one of them")
        for name, tensor in tensors.items():
            array = formats.dequantize(tensor).reshape(tensor.shape)
            if name in self.weights:
                self.weights[name][:] = array
            else:
                self.optimizer.state[name] = array
        self.curve = [Point(*row) for row in told["curve"]]
        self.optimizer.steps = len(self.curve)
        return True

    def write_curve(self, path: Path) -> None:
        """The curve as CSV."""
        rows = [",".join(Point._fields), *(",".join(f"{v:.7g}" for v in point) for point in self.curve)]
        with whole(path, nbytes=1 << 20) as (new,):
            new.write_text("\n".join(rows) + "\n")


def checkpoints(folder: Path) -> list[Path]:
    """Those of a folder, the latest last."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))
