"""Calibration: what the linear layers of a model are given while it reads a text.

A linear is whatever can be called. To see its inputs is to put something in its place for a while that looks
at them and passes them on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .arch import Model
from .arch.weights import Progress
from .errors import EdgeqError
from .evaluate.perplexity import Reader
from .evaluate.protocol import cut
from .files.imatrix import CHUNK, Imatrix, Squares


def imatrix(
    llm: Reader,
    text: str,
    *,
    ctx: int = CHUNK,
    chunks: int | None = None,
    first: int = 0,
    output: bool = False,
    dataset: str = "text",
    progress: Progress | None = None,
) -> Imatrix:
    """Measure how much each input of a model's matrices matters, as llama-imatrix does.

    Parameters
    ----------
    llm : the model, from `edgeq.load`; nobody else may use it meanwhile.
    text : what it reads.
    ctx : tokens of a chunk.
    chunks : read so many; None reads all that the text has.
    first : the chunk to begin with.
    output : measure the output matrix, too.
    dataset : name of the text.
    progress : called with ("measuring", chunks read, chunks in all).

    Returns
    -------
    Imatrix
        ``files.imatrix.write`` makes a file of it, ``importance`` has the numbers.
    """
    windows, done = cut_chunks(llm, text, ctx, chunks, first), 0
    measured: dict[str, Squares] = {}
    for squares in measure(llm.model, windows, output=output):
        measured, done = squares, done + 1
        if progress:
            progress("measuring", done, len(windows))
    return Imatrix(measured, [dataset], len(windows), ctx)


def cut_chunks(llm: Reader, text: str, ctx: int, chunks: int | None, first: int = 0) -> np.ndarray:
    """Token ids of the chunks of a text, int64 (chunks, ctx), from chunk number `first` on."""
    limit = llm.model.config.context_length
    if ctx > limit:
        raise ValueError(f"ctx is {ctx}, expected at most {limit}, the limit of the model")
    _, windows = cut(text, llm.tokenizer, "llama.cpp", ctx, None if chunks is None else first + chunks)
    if first >= len(windows):
        raise ValueError(f"the text has {len(windows)} chunks: none is left from number {first} on")
    return windows[first:]


def measure(model: Model, windows: np.ndarray, *, output: bool = False) -> Iterator[dict[str, Squares]]:
    """Read chunks of a text; after each, give what has been measured so far, by name of the weight."""
    watched: list[Watched] = []

    def watch(linear: Any) -> Watched:
        watched.append(Watched(linear))
        return watched[-1]

    cache = model.new_cache(windows.shape[1])
    with replaced(model, watch):
        for window in windows:
            cache.truncate(0)
            hidden = model.hidden(window.tolist(), cache)
            if output:
                model.network.head.look(hidden)
            yield {name: w.squares() for w in watched if w.count for name in w.names}


class Watched:
    """A linear, and the squares of what it was given."""

    def __init__(self, linear: Any) -> None:
        self.linear, self.names = linear, linear.names
        self.sums, self.count = np.zeros(1), 0

    def look(self, x: np.ndarray) -> None:
        """Add the squares of x float32 (n, cols)."""
        # to a new array: what was given out after a chunk stays as it was
        self.sums = self.sums + np.einsum("ij,ij->j", x, x)
        self.count += len(x)

    def squares(self) -> Squares:
        """All of them so far."""
        if not np.isfinite(self.sums).all():
            raise EdgeqError(f"the inputs of {self.names[0]} are not finite numbers")
        return Squares(self.sums.reshape(1, -1), np.full((1, 1), self.count, np.float64))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.look(x)
        return self.linear(x)


@contextmanager
def replaced(model: Model, replace: Callable[[Any], Callable[[np.ndarray], np.ndarray]]) -> Iterator[None]:
    """Put `replace` of each linear in its place; as long as the block lasts."""
    network = model.network
    places = [
        (owner, name, linear)
        for owner in (network, *network.layers)
        for name, linear in vars(owner).items()
        if hasattr(linear, "names")
    ]
    try:
        for owner, name, linear in places:
            setattr(owner, name, replace(linear))
        yield
    finally:
        for owner, name, linear in places:
            setattr(owner, name, linear)
