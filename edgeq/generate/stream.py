"""Stream: the text of tokens, piece by piece, until the model or a stop string ends it."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Literal

from ..kernels.cache import KVCache
from ..tokenizer import Tokenizer
from . import Continuation, Token


class Stops:
    """Streamed text, cut where the first stop string ends up complete.

    Text that may be the beginning of a stop string is held back until the next piece decides.

    Attributes
    ----------
    found : a stop string was met; all text from its first character on is dropped.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(strings)
        self.found = False
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain after one more piece."""
        if self.found:
            return ""
        text = self._held + piece
        # The string that is complete first wins, and of several that end there the longest: so the cut does
        # not depend on how the text is split into pieces.
        ends = [(at + len(s), at) for s in self.strings if (at := text.find(s)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        longest = min(len(text), max(map(len, self.strings), default=0))
        held = next(
            (n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.strings)), 0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What is still held back when the text ends."""
        held, self._held = self._held, ""
        return held


@dataclass
class Timings:
    """What a generation has computed, in the words of llama.cpp.

    Attributes
    ----------
    cache_n : tokens of the prompt that were in the cache.
    prompt_n, prompt_ms : tokens of the prompt that were computed, and the time until the first was sampled.
    predicted_n, predicted_ms : tokens of the answer, and the time for those after the first. What the caller
        does between two pieces does not count.
    draft_n, draft_n_accepted : tokens that prompt lookup has guessed, and those of them that came.
    """

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0
    draft_n: int = 0
    draft_n_accepted: int = 0


class Stream(Iterator[str]):
    """The text of an answer, piece by piece as the model makes it. `LLM.stream` and its like make these.

    Parameters
    ----------
    ids : the prompt.
    begin : makes the sequence of a cache.

    Attributes
    ----------
    tokens : the tokens so far (those of a stop string too), with log-probabilities if asked for.
    finish_reason : None until the end, then "stop" (the model ended, or a stop string was met) or "length"
        (max_tokens, or the end of the context).
    timings : what was computed so far.
    closed : nothing follows what is there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        stops: Stops,
        begin: Callable[[KVCache], Continuation],
    ) -> None:
        self.ids, self.begin = ids, begin
        self.tokens: list[Token] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self.timings = Timings()
        self.closed = False
        self._eog_ids, self._decoder, self._stops = tokenizer.eog_ids, tokenizer.decoder(), stops
        self._ended = False
        self._ready: deque[str] = deque()  # pieces that were not asked for yet
        self._steps: Generator[None, None, None]

    def follow(self, steps: Generator[None, None, None]) -> None:
        """Let each ``next`` of `steps` go on with the stream, by `write`, until they `finish` it."""
        self._steps = steps

    def __next__(self) -> str:
        while not self._ready:
            # Reading another stream of a batch may have ended this one meanwhile: its last pieces count.
            if next(self._steps, self) is self and not self._ready:
                raise StopIteration
        return self._ready.popleft()

    def close(self) -> None:
        """End the generation here and give its cache back. Dropping the stream, or all that go on together,
        does the same.
        """
        self.closed = True
        self._steps.close()
        self._ready.clear()

    def write(self, token: Token) -> bool:
        """Go on with a token; False if it ends the text."""
        self._ended = token.id in self._eog_ids
        if not self._ended:
            self.tokens.append(token)
            self.timings.predicted_n += 1
            self._give(self._stops.push(self._decoder.push(token.id)))
            self._ended = self._stops.found
        return not self._ended

    def finish(self) -> None:
        """No token follows."""
        self._give(self._stops.push(self._decoder.finish()) + self._stops.finish())
        self.finish_reason = "stop" if self._ended or self._stops.found else "length"

    def _give(self, piece: str) -> None:
        if piece:
            self._ready.append(piece)


def alone(
    stream: Stream,
    lent: AbstractContextManager[KVCache],
    tokens: Callable[[KVCache], Generator[Token, None, None]],
) -> Generator[None, None, None]:
    """Steps of a stream that no other takes part in. The cache, which has the prompt's beginning, is taken at
    the first.
    """
    timings = stream.timings
    with lent as cache, closing(tokens(cache)) as made:
        timings.cache_n, timings.prompt_n = cache.length, len(stream.ids) - cache.length
        since = time.perf_counter()
        for token in made:
            ms = 1e3 * (time.perf_counter() - since)
            if timings.prompt_ms:
                timings.predicted_ms += ms
            else:
                timings.prompt_ms = ms
            if not stream.write(token):
                break
            yield
            since = time.perf_counter()
    stream.finish()
