"""Calibration: what the linear layers of a model are given while it reads a text.

A linear is whatever can be called. To see its inputs is to put something in its place for a while that looks
at them and passes them on.

`measure` reads chunk after chunk through the whole model. `walk` takes all chunks through one layer before
the next: what becomes of its weights on the way is what the layers behind it see, and the statistics and
float weights of one layer are in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import arch, formats, kernels
from .arch import Model
from .arch.weights import Progress, Weights
from .errors import EdgeqError
from .evaluate.perplexity import Reader
from .evaluate.protocol import cut
from .files.imatrix import CHUNK, Imatrix, Squares
from .observers import Observer
from .tensor import Tensor


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


def observe(
    model: Model,
    windows: np.ndarray,
    make: Callable[[], Observer],
    *,
    progress: Progress | None = None,
) -> dict[tuple[str, ...], Observer]:
    """Read chunks of a text, with an observer at the inputs of each linear of the layers: by the names of its
    weights. `progress` is called with ("observing", chunks read, chunks in all).
    """
    found: dict[tuple[str, ...], Observer] = {}

    def watch(linear: Any) -> Callable[[np.ndarray], np.ndarray]:
        if not linear.names[0].startswith("blk."):
            return linear
        observer = found[linear.names] = make()

        def look(x: np.ndarray) -> np.ndarray:
            if not np.isfinite(x).all():
                raise EdgeqError(f"the inputs of {linear.names[0]} are not finite numbers")
            observer.look(x)
            return linear(x)

        return look

    cache = model.new_cache(windows.shape[1])
    with replaced(model, watch):
        for done, window in enumerate(windows):
            if progress:
                progress("observing", done, len(windows))
            cache.truncate(0)
            model.hidden(window.tolist(), cache)
    if progress:
        progress("observing", len(windows), len(windows))
    return found


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


class Held:
    """A linear in float32, whose weights are in memory from `hold` to `let_go`.

    weight : float32 (rows, cols), the rows of all tensors; whoever changes it changes the layer.
    """

    names: tuple[str, ...]  # of the tensors, set by who makes it
    weight: np.ndarray

    def __init__(self, tensors: Sequence[Tensor], bias: np.ndarray | None = None, **unused: Any) -> None:
        self.tensors, self.bias = tensors, bias

    def hold(self) -> None:
        """Decode the weights."""
        self.weight = np.concatenate([formats.dequantize(t) for t in self.tensors])

    def let_go(self) -> None:
        """Forget them."""
        del self.weight

    def parts(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and weights of each tensor, which are views of `weight`."""
        ends = np.cumsum([t.rows for t in self.tensors])[:-1]
        return zip(self.names, np.split(self.weight, ends), strict=True)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Inputs:
    """What is known of a linear's inputs X.

    Attributes
    ----------
    hessian : float64 (cols, cols), XXᵀ.
    magnitudes : float64 (cols,), Σ |x|.
    count : inputs.
    """

    def __init__(self, cols: int) -> None:
        self.hessian, self.magnitudes, self.count = np.zeros((cols, cols)), np.zeros(cols), 0

    def look(self, x: np.ndarray) -> None:
        """Add inputs x float32 (n, cols)."""
        self.hessian += x.T @ x
        self.magnitudes += np.abs(x).sum(axis=0)
        self.count += len(x)


def held(
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: object = "model",
    *,
    backend: str = "numba",
    threads: int | None = None,
) -> Model:
    """The model of a file for `walk`: its linears are `Held`, all else is the backend's."""
    module, meta, tensors = arch.identify(meta, tensors, path)
    ops = kernels.backend(backend)
    with_held: Any = SimpleNamespace(**{**vars(ops), "linear": Held})
    network = module.network(meta, Weights(tensors, with_held, path))
    ops.ready(None)
    return Model(network, backend, threads or kernels.cores(), kernels.cache_types(backend, None, None))


def walk(
    model: Model, windows: np.ndarray, *, sequential: bool = True, progress: Progress | None = None
) -> Iterator[tuple[Held, Inputs]]:
    """Give each linear of each layer, in the order in which they compute, and what is known of its inputs.

    Parameters
    ----------
    model : from `held`.
    windows : int (chunks, ctx), the text.
    sequential : look at the inputs of a linear after the one before it was given, and perhaps changed.
        Otherwise those of a layer all see what its own weights were at first, in half the time.
    progress : called with ("layers", those that are done, all of them).
    """
    network, cache = model.network, model.new_cache(windows.shape[1])
    states = [network.embed(window) for window in windows]
    for done, layer in enumerate(network.layers):
        if progress:
            progress("layers", done, len(network.layers))
        linears = [value for value in vars(layer).values() if isinstance(value, Held)]
        for linear in linears:
            linear.hold()
        for group in [[linear] for linear in linears] if sequential else [linears]:
            yield from zip(group, _seen(model, layer, group, windows, states, cache), strict=True)
        with arch.turn(model.ops, model.threads):
            for i, _ in _each(windows, cache):
                states[i] = np.array(layer(states[i], [cache]))
        for linear in linears:
            linear.let_go()
    if progress:
        progress("layers", len(network.layers), len(network.layers))


class _Enough(Exception):
    """What a layer is wanted for has happened."""


def _seen(
    model: Model, layer: Any, linears: list[Held], windows: np.ndarray, states: list[np.ndarray], cache: Any
) -> list[Inputs]:
    """What some linears of a layer are given, in the order in which they compute."""
    found = {id(linear): Inputs(linear.tensors[0].cols) for linear in linears}
    places = {name: value for name, value in vars(layer).items() if id(value) in found}

    def watch(linear: Held) -> Callable[[np.ndarray], np.ndarray]:
        def look(x: np.ndarray) -> np.ndarray:
            found[id(linear)].look(x)
            if linear is linears[-1]:
                raise _Enough
            return linear(x)

        return look

    try:
        vars(layer).update({name: watch(linear) for name, linear in places.items()})
        with arch.turn(model.ops, model.threads):
            for i, _ in _each(windows, cache):
                with suppress(_Enough):
                    layer(states[i], [cache])
    finally:
        vars(layer).update(places)
    for linear in linears:
        if not np.isfinite(found[id(linear)].hessian).all():
            raise EdgeqError(f"the inputs of {linear.names[0]} are not finite numbers")
    return [found[id(linear)] for linear in linears]


def _each(windows: np.ndarray, cache: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Each chunk and its number, with its tokens in the cache."""
    for i, window in enumerate(windows):
        cache.truncate(0)
        cache.tokens.extend(window.tolist())
        yield i, window
