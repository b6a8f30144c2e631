"""Calibration: what the linear layers of a model are given while it reads a text.

A linear is whatever can be called. To see its inputs is to put something in its place for a while that looks
at them and passes them on.

`measure` reads chunk after chunk through the whole model. `walk` takes all chunks through one layer before
the next: what becomes of its weights on the way is what the layers behind it see, and the statistics and
float weights of one layer are in memory.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from queue import SimpleQueue
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from . import arch, files, formats, kernels
from .arch import Model
from .arch.weights import Progress, Weights
from .errors import EdgeqError
from .evaluate.perplexity import Reader
from .evaluate.protocol import cut
from .files.imatrix import CHUNK, Imatrix, Squares
from .observers import Observer
from .tensor import Tensor

AT_ONCE = 8  # chunks that are made up together
NEAR = 64  # inputs that stay in the cache while they are looked at
TOGETHER = 4  # chunks that go through a layer as one matrix


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
    original : what it was at first.
    """

    names: tuple[str, ...]  # of the tensors, set by who makes it
    weight: np.ndarray
    original: np.ndarray

    def __init__(
        self, ops: ModuleType, tensors: Sequence[Tensor], bias: np.ndarray | None = None, **unused: Any
    ) -> None:
        self.ops, self.tensors, self.bias = ops, tensors, bias

    def hold(self) -> None:
        """Decode the weights."""
        self.original = np.concatenate([formats.dequantize(t) for t in self.tensors])
        self.weight = self.original.copy()

    def let_go(self) -> None:
        """Forget them, and let the system take back what they were decoded from."""
        del self.weight, self.original
        for t in self.tensors:
            files.release(t.data)

    def parts(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and weights of each tensor, which are views of `weight`."""
        ends = np.cumsum([t.rows for t in self.tensors])[:-1]
        return zip(self.names, np.split(self.weight, ends), strict=True)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self._with(self.weight, x)

    def at_first(self, x: np.ndarray) -> np.ndarray:
        """What it made of x before its weights were changed."""
        return self._with(self.original, x)

    def _with(self, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
        y = self.ops.dot(x, weight.T)
        return y if self.bias is None else y + self.bias


class Inputs:
    """What is known of a linear's inputs X.

    Attributes
    ----------
    hessian : float64 (cols, cols), XXᵀ.
    drift : float64 (cols, cols), (X̃ - X)Xᵀ, where X̃ are the inputs in the model as it was at first; None
        where nobody asked for it.
    magnitudes : float64 (cols,), Σ |x|.
    count : inputs.
    """

    def __init__(self, cols: int, ops: ModuleType, *, drift: bool = False) -> None:
        self.ops = ops
        self.hessian, self.magnitudes, self.count = np.zeros((cols, cols)), np.zeros(cols), 0
        self.drift = np.zeros((cols, cols)) if drift else None

    def look(self, x: np.ndarray, original: np.ndarray | None = None) -> None:
        """Add inputs x float32 (n, cols), and what they were at first."""
        for start in range(0, len(x), NEAR):
            self.magnitudes += np.abs(x[start : start + NEAR]).sum(axis=0)
        self.count += len(x)
        self.hessian += self.ops.gram(x)
        if self.drift is not None and original is not None:
            self.drift += self.ops.dot((original - x).T, x)


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
    with_held: Any = SimpleNamespace(**{**vars(ops), "linear": partial(Held, ops)})
    network = module.network(meta, Weights(tensors, with_held, path))
    ops.ready(None)
    return Model(network, backend, threads or kernels.cores(), kernels.cache_types(backend, None, None))


def walk(
    model: Model,
    windows: np.ndarray,
    *,
    drift: bool = False,
    done: Callable[[Held], bool] = lambda linear: False,
    progress: Progress | None = None,
) -> Iterator[tuple[Held, Inputs]]:
    """Give each linear of each layer, in the order in which they compute, and what is known of its inputs.

    All chunks wait at a linear until it was given, and perhaps changed; what becomes of its weights is what
    the linears behind it see. So each computes once.

    Parameters
    ----------
    model : from `held`.
    windows : int (chunks, ctx), the text.
    drift : read the text with the model as it was at first, too, and see how inputs differ.
    done : whether a linear has its weights already, or is given them now: it is not given to anybody else.
    progress : called with ("layers", those that are done, all of them).
    """
    network, cache = model.network, model.new_cache(windows.shape[1])
    # chunks take turns with one cache: each reads what it wrote before the next one writes
    cache.tokens.extend(windows[0].tolist())
    groups = [windows[start : start + TOGETHER] for start in range(0, len(windows), TOGETHER)]
    caches = [[cache] * len(group) for group in groups]
    states = [[network.embed(group.reshape(-1)) for group in groups] for _ in range(1 + drift)]
    for i, layer in enumerate(network.layers):
        if progress:
            progress("layers", i, len(network.layers))
        linears = {name: value for name, value in vars(layer).items() if isinstance(value, Held)}
        for linear in linears.values():
            linear.hold()
        streams = [
            [Passage(layer, x, turns) for x, turns in zip(stream, caches, strict=True)] for stream in states
        ]
        states.clear()
        vars(layer).update({name: partial(wait, linear) for name, linear in linears.items()})
        try:
            with arch.turn(model.ops, model.threads):
                for stream in streams:
                    _go_on(stream)
            while (at := streams[0][0].at) is not None:
                if not done(at):
                    with arch.turn(model.ops, model.threads):
                        inputs = _seen(streams)
                    yield at, inputs
                with arch.turn(model.ops, model.threads):
                    _go_on(streams[0], at)
                    for stream in streams[1:]:
                        _go_on(stream, at.at_first)
            states = [[np.array(passage.take()) for passage in stream] for stream in streams]
        finally:
            for passage in chain(*streams):
                passage.end()
            vars(layer).update(linears)
        for linear in linears.values():
            linear.let_go()
    if progress:
        progress("layers", len(network.layers), len(network.layers))


def _go_on(stream: Iterable["Passage"], linear: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
    """Let all go on to the next linear, with what `linear` makes of what they wait with."""
    for passage in stream:
        passage.go_on(None if linear is None else linear(passage.x))


def _seen(streams: Sequence[Sequence["Passage"]]) -> Inputs:
    """What is known of the inputs at which all chunks wait."""
    linear, drift = streams[0][0].at, len(streams) > 1
    assert linear is not None
    inputs = Inputs(linear.tensors[0].cols, linear.ops, drift=drift)
    for passages in zip(*streams, strict=True):
        inputs.look(*(passage.x for passage in passages))
    if not np.isfinite(inputs.hessian).all():
        raise EdgeqError(f"the inputs of {linear.names[0]} are not finite numbers")
    return inputs


class Passage(threading.Thread):
    """Some chunks on their way through a layer: a thread that runs only while `go_on` waits for it to arrive.

    Attributes
    ----------
    at : the linear where it waits; None before it starts and once it is through.
    x : what that linear is given; before, what the layer is given; in the end, what the layer made.
    """

    x: Any

    def __init__(self, layer: Any, x: np.ndarray, caches: Sequence[Any]) -> None:
        super().__init__(daemon=True)
        self.layer, self.x, self.caches = layer, x, caches
        self.at: Held | None = None
        self.error: BaseException | None = None
        self.answers: SimpleQueue[Any] = SimpleQueue()
        self.arrived = threading.Semaphore(0)

    def go_on(self, answer: Any) -> None:
        """Give it what it waits for, and wait until it is at the next linear, or through."""
        if self.ident is None:
            self.start()
        else:
            self.x = None
            self.answers.put(answer)
        self.arrived.acquire()
        if self.error:
            raise self.error

    def end(self) -> None:
        """Give up what has not arrived."""
        if self.at:
            self.answers.put(_End)
            self.join()

    def take(self) -> np.ndarray:
        """Its x, which it forgets."""
        x, self.x = self.x, None
        return x

    def run(self) -> None:
        """Called by the thread."""
        try:
            # a method's arguments belong to it alone: the layer lets go of x when it needs it no more
            self.x = self.layer.__call__(self.take(), self.caches)
        except _End:
            pass
        except BaseException as e:
            self.error = e
        self.at = None
        self.arrived.release()


def sampled(
    model: Model, chunks: int, ctx: int, *, first: int | None, seed: int, progress: Progress | None = None
) -> np.ndarray:
    """A text that the model makes up, token ids int64 (chunks, ctx), for want of another one.

    Each chunk begins with the token `first`, or with any where there is none, and goes on with what the model
    thinks likely, at temperature 1.

    Source: Liu et al., LLM-QAT, arXiv 2305.17888, where the first few tokens are the likeliest.
    """
    rng, vocab = np.random.default_rng(seed), model.config.vocab_size
    windows = np.empty((chunks, ctx), np.int64)
    windows[:, 0] = rng.integers(vocab, size=chunks) if first is None else first
    for start in range(0, chunks, AT_ONCE):
        part = windows[start : start + AT_ONCE]
        caches = [model.new_cache(ctx) for _ in part]
        for i in range(1, ctx):
            logits = model.step(part[:, i - 1].tolist(), caches).astype(np.float64)
            # the largest of logits with such noise is distributed as their softmax
            part[:, i] = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
            if progress:
                progress("making up a text", start * ctx + len(part) * (i + 1), chunks * ctx)
    return windows


class _End(Exception):
    """A passage is not wanted any more."""


def wait(linear: Held, x: np.ndarray) -> np.ndarray:
    """Stand in for a linear in a passage."""
    passage = threading.current_thread()
    assert isinstance(passage, Passage)
    passage.at, passage.x = linear, x
    passage.arrived.release()
    answer = passage.answers.get()
    if answer is _End:
        raise _End
    return answer
