"""How well a model predicts a text, and how far its predictions are from those of another model.

    perplexity      exp(mean of -ln p(token | those before it)) over the scored tokens of a text
    KL divergence   Σ p_base ln(p_base / p) over the vocabulary, at each scored token
    Δp              p - p_base of the token that is right
    same top        whether both models find the same token most probable

Both models read the text side by side, chunk by chunk, a few tokens' logits at a time: memory grows with
neither the text nor the vocabulary times the context, and no logits are stored. The definitions are those of
llama-perplexity. Its KL divergences are of base logits that it rounds to 16 bits first; these are not.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol as Interface

import numpy as np

from ..arch import Model
from ..arch.weights import Progress
from ..errors import EdgeqError
from ..kernels.cache import KVCache
from ..tokenizer import Tokenizer
from .estimates import Estimate, correlation, exp_mean, mean, quantile, root_mean_square
from .protocol import Protocol, cut

# Tokens whose logits are in memory together: so few that the fast head takes 16-bit activations, as it does
# in an answer. With the 8 bits of a long prompt the KL divergence of SmolLM2 Q4_1 is 0.0028, not 0.0022.
SLICE = 16
PERCENTILES = (90.0, 95.0, 99.0, 99.9)


class Reader(Interface):
    """What can be measured: an `LLM`, or whatever has its model and its tokenizer."""

    @property
    def model(self) -> Model: ...
    @property
    def tokenizer(self) -> Tokenizer: ...


@dataclass(frozen=True, eq=False)
class Measurement:
    """A model on a text, alone or against a base.

    Attributes
    ----------
    protocol : how it was measured.
    nll : -ln of the probability of each scored token, float64 (scored,).
    base_nll : the base's, or None if there was none, as for the next two.
    kld : KL divergence from the base at each scored token, float64 (scored,).
    same_top : whether both find the same token most probable there, bool (scored,).
    """

    protocol: Protocol
    nll: np.ndarray
    base_nll: np.ndarray | None = None
    kld: np.ndarray | None = None
    same_top: np.ndarray | None = None

    @property
    def perplexity(self) -> Estimate:
        """exp(mean(nll)) and its standard error."""
        return exp_mean(self.nll)

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """All measures, by name: ``ppl``, and against a base ``ppl_base``, ``ppl_correlation`` (of the
        logarithms of each token's), ``ln_ppl_ratio``, ``ppl_ratio``, ``ppl_difference``, ``kld_mean``,
        ``kld_maximum``, ``kld_99.9``, ``kld_99``, ``kld_95``, ``kld_90``, ``kld_median``, ``dp_mean``,
        ``dp_rms`` and ``same_top``.
        """
        found = {"ppl": self.perplexity}
        if self.base_nll is None or self.kld is None or self.same_top is None:
            return found
        base = exp_mean(self.base_nll)
        dp = np.exp(-self.nll) - np.exp(-self.base_nll)
        return {
            **found,
            "ppl_base": base,
            "ppl_correlation": correlation(self.nll, self.base_nll),
            "ln_ppl_ratio": mean(self.nll - self.base_nll),
            "ppl_ratio": exp_mean(self.nll - self.base_nll),
            # to first order the error of a difference of exponentials is that of their weighted logarithms
            "ppl_difference": Estimate(
                found["ppl"].value - base.value,
                mean(found["ppl"].value * self.nll - base.value * self.base_nll).error,
            ),
            "kld_mean": mean(self.kld),
            "kld_maximum": Estimate(float(self.kld.max()), math.nan),
            **{f"kld_{p:g}": quantile(self.kld, p / 100) for p in reversed(PERCENTILES)},
            "kld_median": quantile(self.kld, 0.5),
            "dp_mean": mean(dp),
            "dp_rms": root_mean_square(dp),
            "same_top": mean(self.same_top),
        }


def perplexity(
    llm: Reader,
    text: str,
    *,
    base: Reader | None = None,
    protocol: str = "llama.cpp",
    ctx: int | None = None,
    chunks: int | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measure how well a model predicts a text, and how far it is from a base model.

    Parameters
    ----------
    llm : the model, from `edgeq.load`.
    text : what to predict, such as the file ``wiki.test.raw`` of WikiText-2.
    base : another model of the same vocabulary, or the same one on the exact backend.
    protocol : "llama.cpp" or "gptq", see ``evaluate.protocol``.
    ctx : tokens of a chunk; None takes the protocol's own, 512 or 2048.
    chunks : read only the first ones; None reads all that the text has.
    progress : called with (stage, done, total) while the text is read.

    Returns
    -------
    Measurement
        ``.perplexity`` (value, error), ``.estimates`` (a dictionary of them), ``.protocol``, and ``.nll``,
        ``.kld``, ... of every scored token.

    Raises
    ------
    EdgeqError
        The text is shorter than a chunk, the vocabularies differ, or a model's logits are not numbers.
    """
    how, windows = cut(text, llm.tokenizer, protocol, ctx, chunks)
    report = progress or (lambda stage, done, total: None)
    report("measuring", 0, how.chunks)
    for measured in measure(llm, how, windows, base):
        report("measuring", measured.protocol.chunks, how.chunks)
    return measured


def measure(
    llm: Reader, protocol: Protocol, windows: np.ndarray, base: Reader | None = None
) -> Iterator[Measurement]:
    """Read the chunks of a text, as `cut` gives them; after each, give what has been measured so far."""
    readers = {"the model": llm} if base is None else {"the model": llm, "the base": base}
    for who, reader in readers.items():
        limit = reader.model.config.context_length
        if protocol.ctx > limit:
            raise ValueError(f"ctx is {protocol.ctx}, expected at most {limit}, the limit of {who}")
    if base is not None:
        check_vocabulary(llm, base, windows)
    caches = {who: reader.model.new_cache(protocol.ctx) for who, reader in readers.items()}
    parts: list[tuple[np.ndarray, ...]] = []
    for done, window in enumerate(windows, 1):
        scored = window[protocol.first_scored :]
        slices = [
            predictions(who, reader.model, caches[who], window, len(scored))
            for who, reader in readers.items()
        ]
        targets = np.split(scored, range(SLICE, len(scored), SLICE))
        parts += [score(*slice) for slice in zip(targets, *slices, strict=True)]
        parts = [tuple(map(np.concatenate, zip(*parts, strict=True)))]
        yield Measurement(replace(protocol, chunks=done), *parts[0])


def check_vocabulary(llm: Reader, base: Reader, ids: np.ndarray) -> None:
    """Raise EdgeqError unless both models predict as many tokens, and these ids mean the same to both."""
    sizes = [reader.model.config.vocab_size for reader in (llm, base)]
    if sizes[0] != sizes[1]:
        raise EdgeqError(f"the model predicts {sizes[0]:,} tokens and the base {sizes[1]:,}: no base for it")
    for id in np.unique(ids).tolist():
        token, other = (reader.tokenizer.token(id) for reader in (llm, base))
        if token != other:
            raise EdgeqError(f"token {id} is {token!r} to the model, {other!r} to the base: no base for it")


def predictions(
    who: str, model: Model, cache: KVCache, window: np.ndarray, count: int
) -> Iterator[np.ndarray]:
    """ln p of all tokens in place of each of a chunk's last `count`, float64 (SLICE or fewer, vocab)."""
    cache.truncate(0)
    states = model.hidden(window[:-1].tolist(), cache)[-count:]  # the state after a token predicts the next
    for at in range(0, count, SLICE):
        logits = model.head(states[at : at + SLICE])
        if not np.isfinite(logits).all():
            raise EdgeqError(f"{who} computes logits that are not finite numbers")
        yield log_softmax(logits)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """ln(exp(x) / sum(exp(x))) over the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def score(ids: np.ndarray, log_p: np.ndarray, log_base: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """nll, and against a base base_nll, kld and same_top of the right ids (n,), from ln p (n, vocab)."""
    right = np.arange(len(ids)), ids
    if log_base is None:
        return (-log_p[right],)
    kld = (np.exp(log_base) * (log_base - log_p)).sum(axis=1)
    return -log_p[right], -log_base[right], kld, log_p.argmax(axis=1) == log_base.argmax(axis=1)
