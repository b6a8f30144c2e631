"""Prompt lookup: tokens are guessed from the text so far, and the model checks the guesses in one call.

    text      ... b = a * 2 ; print ( b )   ...   b = a *
    guesses                                               2 ; print ( b )

Where the last few tokens stood in the text before, prompt or answer, what followed then may follow again. The
model reads the guesses along with the token before them. That takes less time than one after the other, as
each weight is loaded once for all. As long as the sampler chooses what was guessed, its next logits are there
already; its first other choice drops the rest. So with any sampler the same text comes.

How much longer a check takes than a step, and how many tokens come of it, depends on the machine, the model
and the text: both are measured, and guesses are made as long as they pay.

The method is Saxena's (2023, github.com/apoorvumang/prompt-lookup-decoding), prompt_lookup_num_tokens in
Transformers.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from ..kernels.cache import KVCache
from . import Compute
from .stream import Timings

MOST = 15  # guesses at once: with the token before them, what the kernels compute like one token
MATCHES = (4, 3, 2)  # last tokens that stood in the text before, to make guesses of what followed
GAIN = 3.0  # tokens that are expected of a check, before any was made
NEWS = 1 / 4  # weight of the latest check in that
HOPE = 1 / 400  # part by which that grows with each check forgone


class Lookup:
    """Computes the steps of `generate`.

    Parameters
    ----------
    model : a model, or a function that calls one.
    text : the prompt.
    most : guesses at once, up to 15.
    timings : where guesses are counted.
    """

    def __init__(self, model: Compute, text: Iterable[int], most: int, timings: Timings) -> None:
        self.model, self.most, self.timings = model, most, timings
        self.text: list[int] = []
        self.followed: dict[tuple[int, ...], int] = {}  # by what, as a place in the text, at the latest
        self.ahead: deque[tuple[int, np.ndarray]] = deque()  # guesses, and the logits after each
        self.came = 0  # tokens that the latest check gave; 0 after a step
        self.gain = GAIN
        self.seconds = [0.0, 0.0]  # of a step, and of a check; 0 before the first
        for token in text:
            self._read(token)

    def __call__(self, token: int, cache: KVCache) -> np.ndarray:
        """Append a token to the cache; the logits after it, float32 (vocab,)."""
        place = self._read(token)
        if self.ahead:
            guess, logits = self.ahead.popleft()
            if guess == token:
                self.came += 1
                self.timings.draft_n_accepted += 1
                cache.tokens.append(token)  # its keys and values still lie where the cache was cut
                return logits
            self.ahead.clear()
        if self.came:
            self.gain += NEWS * (self.came - self.gain)
        guesses = self._guesses(place, min(self.most, cache.capacity - cache.length - 1))
        rows = self._compute([token, *guesses], cache)
        cache.truncate(cache.length - len(guesses))
        self.ahead.extend(zip(guesses, rows[1:], strict=True))
        self.timings.draft_n += len(guesses)
        self.came = 1 if guesses else 0
        return rows[0]

    def _read(self, token: int) -> int:
        """Go on with the text; the place after where its last tokens stood before, 0 if nowhere."""
        self.text.append(token)
        place = 0
        for n in MATCHES:
            if len(self.text) >= n:
                end = tuple(self.text[-n:])
                place = place or self.followed.get(end, 0)
                self.followed[end] = len(self.text)
        return place

    def _guesses(self, place: int, most: int) -> list[int]:
        """What stands at a place of the text, if checking that pays."""
        if not place or most < 1:
            return []
        step, check = self.seconds
        if check >= step * self.gain:
            self.gain *= 1 + HOPE
            return []
        run = self.text[place : place + most]
        return (run * most)[:most]  # where it reaches the end, the text repeats itself

    def _compute(self, ids: Sequence[int], cache: KVCache) -> np.ndarray:
        """Logits after each token, float32 (len(ids), vocab)."""
        since = time.perf_counter()
        rows = self.model(ids, cache, "all" if len(ids) > 1 else "last")
        took, kind = time.perf_counter() - since, len(ids) > 1
        usual = self.seconds[kind] or took
        self.seconds[kind] = min(took, usual + NEWS * (took - usual))  # delays count little
        return rows
