"""The loop that makes text: a prompt into the cache, then sample, feed, sample, feed.

    reuse      what the cache already holds of a prompt
    generate   tokens, as long as the context has room (or by shifting it)
    Stops      cuts streamed text at stop strings
    Stream     the text of those tokens, as it comes

The cache stays sound: a model that is interrupted takes back the step it was in, so Ctrl-C in a long prompt
loses one chunk of it, and a generator closed early loses nothing.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from .arch import CHUNK
from .arch.weights import Progress
from .kernels.cache import KVCache
from .sample import Sampler, keep_top_k, log_softmax
from .tokenizer import Tokenizer

Compute = Callable[[Sequence[int], KVCache], np.ndarray]  # a Model, or a function that calls one


class Token(NamedTuple):
    """A sampled token.

    Attributes
    ----------
    id : its id.
    logprob : logarithm of the probability that the model gave it (before any sampling option), if asked for.
    top : the most probable tokens at this place as (id, logprob), best first, if asked for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def reuse(cache: KVCache, ids: Sequence[int]) -> int:
    """Cut the cache to what it shares with the beginning of a prompt, and return how many tokens that is.

    The last token of the prompt is never among them: its logits are wanted, so it has to be computed.
    """
    limit = min(cache.length, len(ids) - 1)
    same = next((i for i in range(limit) if cache.tokens[i] != ids[i]), limit)
    cache.truncate(same)
    return same


def prefill(
    model: Compute, cache: KVCache, ids: Sequence[int], progress: Progress | None = None
) -> np.ndarray:
    """Append a prompt to the cache; the logits after it, float32 (vocab,)."""
    for at in range(0, len(ids), CHUNK):
        if progress:
            progress("prompt", at, len(ids))
        logits = model(ids[at : at + CHUNK], cache)
    if progress:
        progress("prompt", len(ids), len(ids))
    return logits[0]


def generate(
    model: Compute,
    cache: KVCache,
    ids: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int | None = None,
    keep: int | None = None,
    logprobs: int | None = None,
    progress: Progress | None = None,
) -> Generator[Token, None, None]:
    """Sample tokens after those in the cache and `ids`.

    Parameters
    ----------
    model, cache : a model and the cache of the sequence; nothing else may use the cache meanwhile.
    ids : the tokens to append before the first is sampled, at least one.
    sampler : from ``sample.make_sampler``.
    max_tokens : end after this many; None goes on until the context is full.
    keep : None ends when the context is full. A number shifts it then: the first `keep` tokens stay, the
        older half of the others is forgotten.
    logprobs : None, or how many alternatives to report with each token's log-probability.
    progress : called with ("prompt", done, total) while `ids` are computed.

    Yields
    ------
    Token
        A step is computed when the next token is asked for: who sees an end token need not go on.
    """
    logits = prefill(model, cache, ids, progress)
    made = 0
    shifted = None
    try:
        while True:
            token = sampler(logits, cache.tokens)
            made += 1
            yield _token(token, logits, logprobs)
            if made == max_tokens:
                return
            if cache.length == cache.capacity:
                if keep is None:
                    return
                shifted = keep
                cache.shift(keep, max(1, (cache.length - keep) // 2))
            logits = model([token], cache)[0]
    finally:
        if shifted is not None:
            # The rest was computed with forgotten tokens in sight: no later prompt may take it for its own.
            cache.truncate(min(shifted, cache.length))


def _token(token: int, logits: np.ndarray, logprobs: int | None) -> Token:
    """Token of an id, with the log-probabilities that were asked for."""
    if logprobs is None:
        return Token(token)
    logp = log_softmax(logits)
    top = tuple((int(i), float(logp[i])) for i in keep_top_k(logp, logprobs)) if logprobs else ()
    return Token(token, float(logp[token]), top)


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
    """

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0


class Stream(Iterator[str]):
    """The text of an answer, piece by piece as the model makes it. `LLM.stream` and `LLM.chat` make these.

    Attributes
    ----------
    tokens : the tokens so far (those of a stop string too), with log-probabilities if asked for.
    finish_reason : None until the end, then "stop" (the model ended, or a stop string was met) or "length"
        (max_tokens, or the end of the context).
    timings : what was computed so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_n: int,
        lent: AbstractContextManager[KVCache],
        tokens: Callable[[KVCache], Generator[Token, None, None]],
        stops: Stops,
    ) -> None:
        self.tokens: list[Token] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self.timings = Timings()
        self._pieces = self._run(tokenizer, prompt_n, lent, tokens, stops)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the generation here and give its cache back; dropping the stream does the same."""
        self._pieces.close()

    def _run(
        self,
        tokenizer: Tokenizer,
        prompt_n: int,
        lent: AbstractContextManager[KVCache],
        tokens: Callable[[KVCache], Generator[Token, None, None]],
        stops: Stops,
    ) -> Generator[str, None, None]:
        """The pieces; the cache, holding the prompt's beginning, is taken when the first is asked for."""
        decoder, timings = tokenizer.decoder(), self.timings
        ended = False
        with lent as cache, closing(tokens(cache)) as made:
            timings.cache_n, timings.prompt_n = cache.length, prompt_n - cache.length
            since = time.perf_counter()
            for token in made:
                ms = 1e3 * (time.perf_counter() - since)
                if timings.prompt_ms:
                    timings.predicted_ms += ms
                else:
                    timings.prompt_ms = ms
                ended = token.id in tokenizer.eog_ids
                if not ended:
                    self.tokens.append(token)
                    timings.predicted_n += 1
                    if piece := stops.push(decoder.push(token.id)):
                        yield piece
                if ended or stops.found:
                    break
                since = time.perf_counter()
        rest = stops.push(decoder.finish()) + stops.finish()
        self.finish_reason = "stop" if ended or stops.found else "length"
        if rest:
            yield rest
