"""Batch: streams that are computed together, as a step loads each weight once for all of them.

A stream that ends leaves its place to the next one that waits. It samples with its own sampler from its own
logits, so its text is the one that it would have alone.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing
from typing import NamedTuple

import numpy as np

from ..arch.weights import Progress
from ..kernels.cache import KVCache
from . import Compute, Continuation, prefill
from .stream import Stream, Timings

Life = Generator[Continuation | None, np.ndarray, None]


class Member(NamedTuple):
    """A stream that has a place."""

    stream: Stream
    life: Life
    text: Continuation


class Batch:
    """Makes streams go on together, whichever of them is read, in one thread or in several.

    Parameters
    ----------
    streams : none of them begun.
    model : computes a prompt, as a ``Model``.
    step : computes a token for each of several sequences, as ``Model.step``.
    lend : a cache, cut to what it has of a prompt.
    places : streams at once; the others wait.
    progress : called with ("answers", done, total).

    Attributes
    ----------
    timings : of all streams together, when all have ended.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        model: Compute,
        step: Callable[[Sequence[int], Sequence[KVCache]], np.ndarray],
        lend: Callable[[Sequence[int]], AbstractContextManager[KVCache]],
        places: int,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.step, self.lend, self.places, self.progress = model, step, lend, places, progress
        self.timings = Timings()
        self.rounds = self._rounds(streams)
        self.turn = threading.Lock()
        for stream in streams:
            stream.follow(self._steps(stream))

    def _steps(self, stream: Stream) -> Generator[None, None, None]:
        """The steps of a stream: rounds of all."""
        while stream.finish_reason is None:
            with self.turn:
                if next(self.rounds, self) is self:
                    return  # an error has ended them all
            yield

    def _rounds(self, streams: Sequence[Stream]) -> Generator[None, None, None]:
        """Rounds, in each of which one stream begins, or all that have begun get a token."""
        waiting = deque(streams)
        members: list[Member] = []
        try:
            while waiting or members:
                members = [m for m in members if not m.stream.closed]
                if waiting and len(members) < self.places:
                    if not (stream := waiting.popleft()).closed:
                        members += self._begin(stream)
                elif members:
                    members = self._step(members)
                if self.progress:
                    self.progress("answers", len(streams) - len(waiting) - len(members), len(streams))
                if waiting or members:
                    yield
        finally:
            for member in members:
                member.life.close()
            for name in ("cache_n", "prompt_n", "prompt_ms", "predicted_n"):
                setattr(self.timings, name, sum(getattr(s.timings, name) for s in streams))

    def _begin(self, stream: Stream) -> list[Member]:
        """Compute a stream's prompt and its first token; the stream, if it goes on."""
        since = time.perf_counter()
        life = self._life(stream)
        text = next(life)
        stream.timings.prompt_ms = 1e3 * (time.perf_counter() - since)
        return [Member(stream, life, text)] if text else []

    def _step(self, members: list[Member]) -> list[Member]:
        """Compute a token of each stream; those that go on."""
        since = time.perf_counter()
        # A model that has computed a step of these caches in this order before need not plan it again.
        members.sort(key=lambda m: id(m.text.cache))
        logits = self.step([m.text.last for m in members], [m.text.cache for m in members])
        going = [m for m, row in zip(members, logits, strict=True) if m.life.send(row)]
        ms = 1e3 * (time.perf_counter() - since)
        for timings in (self.timings, *(m.stream.timings for m in members)):
            timings.predicted_ms += ms
        return going

    def _life(self, stream: Stream) -> Life:
        """A stream from its prompt on. Gives its sequence, is sent the logits after it, again and again, and
        gives None at its end.
        """
        with self.lend(stream.ids) as cache, closing(stream.begin(cache)) as text:
            stream.timings.cache_n, stream.timings.prompt_n = cache.length, len(stream.ids) - cache.length
            going = stream.write(text.sample(prefill(self.model, cache, stream.ids[cache.length :])))
            while going and text.has_room():
                going = stream.write(text.sample((yield text)))
        stream.finish()
        yield None
