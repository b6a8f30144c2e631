"""Architectures: one module each, named as GGUF's general.architecture.

A module holds

    network(meta, weights) -> Network    config, ropes(positions), embed(ids) -> x, forward(x, caches) ->
                                         hidden states, head(hidden) -> logits
    HF_NAMES, from_huggingface(config)   its names in Hugging Face checkpoints, and GGUF metadata of a
    config.json
    to_huggingface(meta, weights)        the way back: its Config, and what a config.json says besides
"""

import importlib
import os
import pkgutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, Literal

import numpy as np

from .. import kernels
from ..errors import ContextFull, FormatError
from ..kernels.cache import KVCache
from ..tensor import Tensor
from . import huggingface
from .weights import Progress, Weights

CHUNK = 512  # tokens that go through the layers together: bounds the scratch memory of a long prompt
AGAIN = 16  # tokens that are computed together over and over, at most
TURN = threading.Lock()  # the kernels' pool of threads serves one caller at a time
os.register_at_fork(after_in_child=lambda: globals().update(TURN=threading.Lock()))
HELPERS = ("as_huggingface", "config", "huggingface", "weights")


@contextmanager
def turn(ops: ModuleType, threads: int) -> Iterator[None]:
    """Compute with a backend when no other thread does."""
    with TURN, ops.computing(threads):
        yield


@cache
def names() -> tuple[str, ...]:
    """Architectures that edgeq runs."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in HELPERS))


def module(name: str) -> ModuleType:
    """The module of an architecture."""
    return importlib.import_module(f"{__name__}.{name}")


class Model:
    """A network and the backend that computes it.

    Attributes
    ----------
    config : the model's shape.
    backend : "numba" or "numpy".
    threads : threads that compute.
    cache_types : of keys and values in new caches, see ``kernels/cache.py``.
    """

    def __init__(self, network: Any, backend: str, threads: int, cache_types: tuple[str, str]) -> None:
        self.network, self.backend, self.threads, self.cache_types = network, backend, threads, cache_types
        self.config, self.ops = network.config, kernels.backend(backend)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for a sequence of up to `capacity` tokens."""
        c = self.config
        return KVCache(capacity, c.kv_heads, c.head_dim, self.network.ropes(capacity), *self.cache_types)

    def __call__(
        self, ids: Sequence[int], cache: KVCache, logits: Literal["last", "all"] = "last"
    ) -> np.ndarray:
        """Append tokens to the sequence in the cache.

        Returns the logits of the token after the last one, float32 (1, vocab), or after each one, (n, vocab).
        The cache is as it was before when this raises. Calls from several threads wait for their turn.
        """
        tokens, start = self._checked(ids), cache.length
        with self._turn(cache):
            out = []
            for chunk in self._chunks(tokens, cache):
                if logits == "all" or cache.length == start + len(tokens):
                    out.append(self._logits(chunk, [cache], logits))
                else:
                    self._hidden(chunk, cache)
            return np.concatenate(out) if len(out) > 1 else out[0]

    def hidden(self, ids: Sequence[int], cache: KVCache) -> np.ndarray:
        """Append tokens to the sequence in the cache, and return what `head` makes the logits after each of,
        float32 (n, dim). The cache is as it was before when this raises.
        """
        tokens = self._checked(ids)
        with self._turn(cache):
            return np.concatenate([self._hidden(chunk, cache) for chunk in self._chunks(tokens, cache)])

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Logits, float32 (n, vocab), of what `hidden` returned, or of some rows of it."""
        with self._turn():
            return self.network.head(hidden)

    def step(self, ids: Sequence[int], caches: Sequence[KVCache]) -> np.ndarray:
        """Append one token to each of several sequences, which share every weight that is read.

        Returns the logits after each, float32 (len(ids), vocab). The caches are as they were before when this
        raises.
        """
        tokens = self._checked(ids)
        if len(tokens) != len(caches) or len({id(c) for c in caches}) != len(caches):
            raise ValueError(
                f"expected one token for each of {len(caches)} different caches, found {len(tokens)}"
            )
        with self._turn(*caches):
            for cache in caches:
                if cache.length == cache.capacity:
                    raise ContextFull(f"a sequence fills its context of {cache.capacity} tokens")
            for token, cache in zip(tokens.tolist(), caches, strict=True):
                cache.tokens.append(token)
            return self._logits(tokens, caches, "all")

    @contextmanager
    def _turn(self, *caches: KVCache) -> Iterator[None]:
        """Take a turn; an error leaves the caches as they were before."""
        with turn(self.ops, self.threads):
            starts = [cache.length for cache in caches]
            try:
                yield
            except BaseException:
                for cache, start in zip(caches, starts, strict=True):
                    cache.truncate(start)
                raise

    def _chunks(self, tokens: np.ndarray, cache: KVCache) -> Iterator[np.ndarray]:
        """Append tokens to the sequence in the cache, chunk by chunk, and give each to be computed."""
        if cache.length + len(tokens) > cache.capacity:
            raise ContextFull(
                f"{cache.length} + {len(tokens)} tokens do not fit the context of {cache.capacity}"
            )
        for at in range(0, len(tokens), CHUNK):
            chunk = tokens[at : at + CHUNK]
            cache.tokens.extend(chunk.tolist())
            yield chunk

    def _hidden(self, tokens: np.ndarray, cache: KVCache) -> np.ndarray:
        """Hidden states float32 (n, dim) of the tokens that end the cache."""
        return self.network.forward(self.network.embed(tokens), [cache])

    def _logits(self, tokens: np.ndarray, caches: Sequence[KVCache], logits: str) -> np.ndarray:
        """Logits after the tokens that end the caches, or after the last of them."""

        def compute(x: np.ndarray) -> np.ndarray:
            hidden = self.network.forward(x, caches)
            return self.network.head(hidden if logits == "all" else hidden[-1:])

        x = self.network.embed(tokens)
        return compute(x) if len(x) > AGAIN else self.ops.again(caches, (len(x), logits), x, compute)

    def _checked(self, ids: Sequence[int]) -> np.ndarray:
        """Token ids as an array; ValueError for what are none."""
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or not len(tokens) or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"expected one or more token ids, found {tokens.dtype} of shape {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(
                f"token ids must lie in 0..{self.config.vocab_size - 1}, found {tokens.min()}..{tokens.max()}"
            )
        return tokens


def identify(
    meta: Mapping[str, Any], tensors: Mapping[str, Tensor], path: object
) -> tuple[ModuleType, Mapping[str, Any], Mapping[str, Tensor]]:
    """The architecture's module, and metadata and tensors under GGUF's names; FormatError for an unknown
    one.
    """
    raw = meta.get("config") if "general.architecture" not in meta else None
    name = meta.get("general.architecture") if raw is None else huggingface.architecture(raw)
    if not isinstance(name, str) or name not in names():
        raise FormatError(path, "architecture", found=repr(name), expected=" or ".join(names()))
    found = module(name)
    if raw is not None:
        meta, tensors = huggingface.translate(raw, tensors, found, path)
    else:  # what edgeq tells itself under such names no file may say
        meta = {k: v for k, v in meta.items() if not k.startswith("edgeq.")}
    return found, meta, tensors


def load(
    meta: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    backend: str = "numba",
    path: object = "model",
    threads: int | None = None,
    cache_types: tuple[str | None, str | None] = (None, None),
    progress: Progress | None = None,
    release: Callable[[np.ndarray], None] = lambda data: None,
) -> Model:
    """Build the model of a file's metadata and tensors (as ``files.read`` gives them).

    `threads` None takes one for each core, `cache_types` None the backend's usual one; `release` is called
    with bytes of matrices that were copied, as ``files.release`` wants them.
    """
    found, meta, tensors = identify(meta, tensors, path)
    ops = kernels.backend(backend)
    threads = threads or kernels.cores()
    keys, values = kernels.cache_types(backend, *cache_types)
    weights = Weights(tensors, ops, path, progress, release, lambda: turn(ops, threads))
    network = found.network(meta, weights)
    ops.ready(progress)
    return Model(network, backend, threads, (keys, values))
