"""The loop that makes text: a prompt into the cache, then sample, feed, sample, feed.

    reuse          what the cache already holds of a prompt
    generate       tokens, as long as the context has room (or by shifting it)
    Continuation   what is the same for one sequence and for many: the next token, and whether it has room
    batch.py       many sequences, which share every step
    lookup.py      fewer steps: tokens guessed from the text so far
    stream.py      the text of the tokens, as they come

The cache stays sound: a model that is interrupted takes back the step it was in, so Ctrl-C in a long prompt
loses one chunk of it, and a generator closed early loses nothing.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..arch import CHUNK
from ..arch.weights import Progress
from ..kernels.cache import KVCache
from ..sample import Sampler, keep_top_k, log_softmax

Compute = Callable[..., np.ndarray]  # (ids, cache, logits="last"): a Model, or a function that calls one
Step = Callable[[int, KVCache], np.ndarray]  # (token, cache) -> the logits after it, float32 (vocab,)


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


@dataclass
class Continuation:
    """A sequence as it grows by sampled tokens.

    Parameters
    ----------
    cache : what it has so far.
    sampler : from ``sample.make_sampler``.
    max_tokens : end after this many; None goes on until the context is full.
    keep : None ends when the context is full. A number shifts it then: the first `keep` tokens stay, the
        older half of the others is forgotten.
    logprobs : None, or how many alternatives to report with each token's log-probability.

    Attributes
    ----------
    last : the token that was sampled last; the cache does not hold it yet.
    made : tokens sampled.
    """

    cache: KVCache
    sampler: Sampler
    max_tokens: int | None = None
    keep: int | None = None
    logprobs: int | None = None
    last: int = field(init=False)
    made: int = field(init=False, default=0)
    shifted: bool = field(init=False, default=False)

    def sample(self, logits: np.ndarray) -> Token:
        """The next token, from the logits float32 (vocab,) after the tokens in the cache."""
        self.last = self.sampler(logits, self.cache.tokens)
        self.made += 1
        if self.logprobs is None:
            return Token(self.last)
        logp = log_softmax(logits)
        best = keep_top_k(logp, self.logprobs) if self.logprobs else ()
        return Token(self.last, float(logp[self.last]), tuple((int(i), float(logp[i])) for i in best))

    def has_room(self) -> bool:
        """Whether a step for one more token may be computed, once the cache has shifted if that is due."""
        if self.made == self.max_tokens:
            return False
        if self.cache.length == self.cache.capacity:
            if self.keep is None:
                return False
            self.shifted = True
            self.cache.shift(self.keep, max(1, (self.cache.length - self.keep) // 2))
        return True

    def close(self) -> None:
        """Leave a cache that later prompts may use."""
        if self.shifted and self.keep is not None:
            # The rest was computed with forgotten tokens in sight: no later prompt may take it for its own.
            self.cache.truncate(min(self.keep, self.cache.length))


def generate(
    model: Compute,
    text: Continuation,
    ids: Sequence[int],
    *,
    step: Step | None = None,
    progress: Progress | None = None,
) -> Generator[Token, None, None]:
    """Sample tokens after those in a sequence's cache and `ids`.

    Parameters
    ----------
    model : a model, or a function that calls one.
    text : the sequence; nothing else may use its cache meanwhile.
    ids : the tokens to append before the first is sampled, at least one.
    step : computes what comes after a sampled token; None asks `model` for it. A `lookup.Lookup` is one.
    progress : called with ("prompt", done, total) while `ids` are computed.

    Yields
    ------
    Token
        A step is computed when the next token is asked for: who sees an end token need not go on.
    """
    with closing(text):
        yield text.sample(prefill(model, text.cache, ids, progress))
        while text.has_room():
            yield text.sample(step(text.last, text.cache) if step else model([text.last], text.cache)[0])
