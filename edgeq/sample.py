"""Samplers: from the logits of the next token to its id.

    bias -> penalties -> top_k -> typical -> top_p -> min_p -> temperature -> draw

Bias and penalties change logits. A filter `keep_*` maps logits (n,) to the positions that stay, so that
filters chain: each sees what the one before left, and takes the softmax of that. After the first the work is
on a few dozen numbers. Names, defaults and order are llama.cpp's.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypedDict

import numpy as np

from .errors import EdgeqError

Sampler = Callable[[np.ndarray, Sequence[int]], int]
RUN = 512  # positions, see `draw`


class Sampling(TypedDict, total=False):
    """The options of `make_sampler`, for functions that pass them on."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | Sequence[int] | None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities, float32 (n,)."""
    shifted = logits - logits.max()
    return shifted - np.float32(math.log(np.exp(shifted).sum(dtype=np.float64)))


def add_bias(logits: np.ndarray, bias: Mapping[int, float]) -> np.ndarray:
    """Logits with `bias[id]` added to each id that it names."""
    if outside := [i for i in bias if not 0 <= i < logits.size]:
        raise ValueError(f"logit_bias names token {outside[0]}, expected 0 to {logits.size - 1}")
    x = logits.copy()
    x[list(bias)] += np.fromiter(bias.values(), np.float32, len(bias))
    return x


def penalize(
    logits: np.ndarray, recent: Sequence[int], *, repeat: float, presence: float, frequency: float
) -> np.ndarray:
    """Logits lowered for the ids in `recent`.

    A positive logit is divided by `repeat` and a negative one multiplied, so that both fall for repeat > 1.
    Then `presence` is subtracted once, and `frequency` for each time that the id occurs.
    """
    occurrences = Counter(recent)
    ids = np.fromiter(occurrences.keys(), np.int64, len(occurrences))
    counts = np.fromiter(occurrences.values(), np.int64, len(occurrences))
    x = logits.copy()
    at = x[ids]
    x[ids] = np.where(at > 0, at / repeat, at * repeat) - presence - frequency * counts
    return x


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest logits, largest first; among equals the lower position wins."""
    # The k-th largest of some partial maxima bounds the k-th largest logit from below, and few logits reach
    # the bound: only those are sorted. How NumPy partitions equal numbers on this CPU does not matter.
    partials = 8 * k
    depth = logits.size // partials
    if depth < 2:
        return (-logits).argsort(kind="stable")[:k]
    maxima = logits[: depth * partials].reshape(depth, partials).max(axis=0)
    maxima.partition(partials - k)
    above = (logits >= maxima[-k]).nonzero()[0]
    return above[(-logits[above]).argsort(kind="stable")[:k]]


def _keep_mass(score: np.ndarray, weights: np.ndarray, mass: float) -> np.ndarray:
    """The fewest positions, best score first, whose weights sum to at least `mass`."""
    k = 256
    while True:
        best = keep_top_k(score, k)
        running = weights[best].cumsum(dtype=np.float64)
        if running[-1] >= mass or k >= score.size:
            return best[: running.searchsorted(mass) + 1]
        k *= 8


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """The fewest positions that are at least p probable together, most probable first."""
    weights = np.exp(logits - logits.max())
    return _keep_mass(logits, weights, p * float(weights.sum()))


def keep_min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Positions at least p times as probable as the most probable one."""
    return (logits >= logits.max() + np.float32(math.log(p))).nonzero()[0]


def keep_typical(logits: np.ndarray, p: float) -> np.ndarray:
    """The fewest positions that are at least p probable together, typical ones first.

    Typical is a surprise, -log(prob), near the entropy: Meister et al. 2022, arXiv 2202.00666.
    """
    logp = log_softmax(logits)
    probs = np.exp(logp)
    entropy = -np.dot(probs, np.where(probs > 0, logp, 0))  # 0 log 0 = 0
    return _keep_mass(-np.abs(logp + entropy), probs, p)


def _draw(weights: np.ndarray, rng: np.random.Generator) -> int:
    """Position drawn with a probability proportional to its weight."""
    running = weights.cumsum(dtype=np.float64)
    return int(running.searchsorted(rng.random() * running[-1], side="right"))


def draw(logits: np.ndarray, rng: np.random.Generator) -> int:
    """Position drawn with the probabilities softmax(logits)."""
    weights = np.exp(logits - logits.max())
    start = 0
    if weights.size > RUN:  # a run first, then a position in it: running sums of them all take long
        start = RUN * _draw(np.add.reduceat(weights, np.arange(0, weights.size, RUN)), rng)
    return start + _draw(weights[start : start + RUN], rng)


def make_sampler(
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 0.95,
    min_p: float = 0.05,
    typical_p: float = 1.0,
    repeat_penalty: float = 1.0,
    repeat_last_n: int = 64,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | Sequence[int] | None = None,
) -> Sampler:
    """A function that chooses the next token.

    Parameters
    ----------
    temperature : divides the logits before the draw; 0 takes the best token (after bias and penalties).
    top_k : keep the k most probable tokens; 0 keeps all.
    top_p : of these, the fewest that hold this probability; 1 keeps all.
    min_p : of these, the ones at least this fraction as probable as the best; 0 keeps all.
    typical_p : locally typical sampling, between top_k and top_p; 1 keeps all.
    repeat_penalty, presence_penalty, frequency_penalty : lower the logits of recent tokens, see `penalize`;
        1, 0 and 0 are neutral.
    repeat_last_n : how many of the last tokens, prompt included, count as recent; -1 counts all.
    logit_bias : {token id: number added to its logit}; ``-math.inf`` bans a token.
    seed : a number, or several, that make the draws repeatable; None takes fresh entropy.

    Returns
    -------
    sampler(logits, history) -> id
        `logits` float32 (vocab,) is left unchanged; `history` holds the ids before this token, oldest first.
        Each draw advances the sampler's random generator: make a new sampler for each text.

    Raises
    ------
    ValueError
        An option is out of its range.
    EdgeqError
        By the sampler, when the logits are not numbers.
    """
    for name, value, low, high in (
        ("temperature", temperature, 0, 1000),
        ("top_k", top_k, 0, math.inf),
        ("top_p", top_p, 0, 1),
        ("min_p", min_p, 0, 1),
        ("typical_p", typical_p, 0, 1),
        ("repeat_last_n", repeat_last_n, -1, math.inf),
        ("presence_penalty", presence_penalty, -math.inf, math.inf),
        ("frequency_penalty", frequency_penalty, -math.inf, math.inf),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}, expected {low} to {high}")
    if not 0 < repeat_penalty < math.inf:
        raise ValueError(f"repeat_penalty is {repeat_penalty}, expected a number above 0 (1 is neutral)")
    filters: list[Callable[[np.ndarray], np.ndarray]] = []
    if top_k > 0:
        filters.append(partial(keep_top_k, k=top_k))
    if typical_p < 1:
        filters.append(partial(keep_typical, p=typical_p))
    if top_p < 1:
        filters.append(partial(keep_top_p, p=top_p))
    if min_p > 0:
        filters.append(partial(keep_min_p, p=min_p))
    penalties = {"repeat": repeat_penalty, "presence": presence_penalty, "frequency": frequency_penalty}
    penalized = repeat_last_n != 0 and (repeat_penalty, presence_penalty, frequency_penalty) != (1, 0, 0)
    divisor = np.float32(temperature)
    rng = np.random.default_rng(seed)

    def sampler(logits: np.ndarray, history: Sequence[int]) -> int:
        x = add_bias(logits, logit_bias) if logit_bias else logits
        if penalized:
            x = penalize(x, history if repeat_last_n < 0 else history[-repeat_last_n:], **penalties)
        best = int(x.argmax())  # of a NaN as soon as there is one
        if not math.isfinite(x[best]):
            raise EdgeqError(
                f"no token can be chosen: the largest logit is {x[best]}, expected a finite number. Either "
                "the model computed nonsense (damaged weights, or an overflow), or logit_bias leaves no token"
            )
        if divisor == 0:
            return best
        ids = None
        for keep in filters:
            kept = keep(x)
            x, ids = x[kept], kept if ids is None else ids[kept]
        with np.errstate(over="ignore"):  # -inf, a probability of 0, is right
            x = (x - x.max()) / divisor
        drawn = draw(x, rng)
        return drawn if ids is None else int(ids[drawn])

    return sampler
