"""The generation loop, on a model whose logits are a checksum of all tokens: any slip changes them."""

import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.arch import CHUNK
from edgeq.generate import Continuation, generate, prefill, reuse
from edgeq.generate.stream import Stops
from edgeq.kernels.cache import KVCache
from edgeq.sample import log_softmax, make_sampler

VOCAB = 32
GREEDY = {"temperature": 0}


def logits_after(ids):
    """Random logits that every one of `ids` has a say in."""
    rng = np.random.default_rng(zlib.crc32(np.asarray(ids, np.int64).tobytes()))
    return rng.standard_normal(VOCAB).astype(np.float32)


class Checksum:
    """A model in the sense of `generate`; it counts what it computes and can be interrupted."""

    def __init__(self, interrupt_at=None):
        self.calls, self.interrupt_at = [], interrupt_at

    def __call__(self, ids, cache):
        if len(self.calls) == self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt
        assert len(ids) <= CHUNK
        assert cache.length + len(ids) <= cache.capacity
        self.calls.append(len(ids))
        cache.tokens.extend(ids)
        return logits_after(cache.tokens)[None]


def new_cache(capacity=64, tokens=()):
    cache = KVCache(capacity, 1, 2, ())
    cache.tokens.extend(tokens)
    return cache


def greedy(ids, n):
    """The specification: everything anew for each token."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(logits_after(ids).argmax()))
    return ids[-n:]


def tokens_of(model, cache, ids, sampler=None, **options):
    text = Continuation(cache, sampler or make_sampler(**GREEDY), **options)
    return generate(model, text, ids)


def run(model, cache, ids, **options):
    sampler = make_sampler(**options.pop("sampling", GREEDY))
    return [t.id for t in tokens_of(model, cache, ids, sampler, **options)]


def test_tokens_are_those_of_a_model_without_a_cache():
    assert run(Checksum(), new_cache(), [3, 1, 4], max_tokens=20) == greedy([3, 1, 4], 20)


def test_a_step_is_computed_only_for_the_next_token():
    model, cache = Checksum(), new_cache()
    assert len(run(model, cache, [3, 1, 4], max_tokens=4)) == 4
    assert model.calls == [3, 1, 1, 1]
    tokens = tokens_of(model, cache, [9])
    assert model.calls == [3, 1, 1, 1]
    next(tokens)
    assert model.calls == [3, 1, 1, 1, 1]


def test_the_sampler_sees_the_whole_sequence():
    seen = []

    def sampler(logits, history):
        seen.append(list(history))
        assert (logits == logits_after(history)).all()
        return 7

    list(tokens_of(Checksum(), new_cache(), [1, 2], sampler, max_tokens=3))
    assert seen == [[1, 2], [1, 2, 7], [1, 2, 7, 7]]


def test_same_seed_same_tokens():
    first, again, other = (
        run(Checksum(), new_cache(), [1], max_tokens=30, sampling={"temperature": 1.5, "seed": s})
        for s in (1, 1, 2)
    )
    assert first == again != other


def test_a_full_context_ends_the_text():
    cache = new_cache(capacity=10)
    assert run(Checksum(), cache, [3, 1, 4]) == greedy(
        [3, 1, 4], 8
    )  # the last token is sampled, not computed
    assert cache.length == 10


def test_a_full_context_shifts():
    lengths = []

    def sampler(logits, history):
        lengths.append(len(history))
        assert list(history[:2]) == [3, 1]
        return len(lengths)

    cache = new_cache(capacity=9)
    tokens = tokens_of(Checksum(), cache, [3, 1, 4], sampler, keep=2)
    made = list(itertools.islice(tokens, 7))
    assert cache.tokens == [3, 1, 4, 1, 2, 3, 4, 5, 6]
    made.append(next(tokens))  # of the 7 after the first 2, 3 are forgotten
    assert cache.tokens == [3, 1, 3, 4, 5, 6, 7]
    made += itertools.islice(tokens, 12)
    assert [t.id for t in made] == list(range(1, 21))
    assert max(lengths) == 9
    tokens.close()
    assert cache.tokens == [3, 1]  # what a prompt would compute, and no more


@pytest.mark.parametrize("keep", [0, 4, 8])
def test_any_keep_below_the_capacity_leaves_room(keep):
    prompt = list(range(8))
    cache = new_cache(capacity=9)
    assert len(run(Checksum(), cache, prompt, keep=keep, max_tokens=40)) == 40
    assert cache.tokens == prompt[:keep]


def test_a_long_prompt_reports_progress():
    n = 2 * CHUNK + 1
    seen = []
    prefill(Checksum(), new_cache(n), [1] * n, lambda *report: seen.append(report))
    assert seen == [("prompt", at, n) for at in (0, CHUNK, 2 * CHUNK, n)]


def test_an_interrupted_prompt_goes_on_where_it_was():
    ids = list(np.random.default_rng(0).integers(0, VOCAB, 3 * CHUNK))
    cache = new_cache(len(ids) + 9)
    with pytest.raises(KeyboardInterrupt):
        run(Checksum(interrupt_at=2), cache, ids)
    assert reuse(cache, ids) == 2 * CHUNK
    model = Checksum()
    assert run(model, cache, ids[cache.length :], max_tokens=3) == greedy(ids, 3)
    assert model.calls == [CHUNK, 1, 1]


def test_an_interrupted_answer_goes_on_where_it_was():
    cache = new_cache()
    tokens = tokens_of(Checksum(interrupt_at=3), cache, [3, 1, 4])
    got = [next(tokens).id for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        next(tokens)
    ids = [3, 1, 4, *got]
    assert reuse(cache, ids) == 5
    assert got + run(Checksum(), cache, ids[5:], max_tokens=4) == greedy([3, 1, 4], 7)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), min_size=1, max_size=8))
def test_reuse_keeps_the_longest_common_beginning(held, ids):
    cache = new_cache(tokens=held)
    n = reuse(cache, ids)
    assert cache.tokens == held[:n] == ids[:n]
    assert n == len(ids) - 1 or held[n : n + 1] != ids[n : n + 1]


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=5))
def test_a_used_cache_changes_no_token(prompts):
    cache = new_cache()
    for ids in prompts:
        n = reuse(cache, ids)
        assert run(Checksum(), cache, ids[n:], max_tokens=5) == greedy(ids, 5)


def test_log_probabilities_are_the_models_own():
    sampling = {"temperature": 2, "top_k": 3, "repeat_penalty": 1.5, "seed": 5}
    tokens = tokens_of(Checksum(), new_cache(), [6], make_sampler(**sampling), max_tokens=8, logprobs=4)
    ids = [6]
    for token in tokens:
        logp = log_softmax(logits_after(ids))
        assert token.logprob == pytest.approx(logp[token.id])
        best = np.argsort(-logp)[:4]
        assert [i for i, _ in token.top] == best.tolist()
        assert [p for _, p in token.top] == pytest.approx(logp[best])
        ids.append(token.id)


def test_log_probabilities_only_when_asked_for():
    (plain,) = tokens_of(Checksum(), new_cache(), [6], max_tokens=1)
    assert (plain.logprob, plain.top) == (None, ())
    (chosen,) = tokens_of(Checksum(), new_cache(), [6], max_tokens=1, logprobs=0)
    assert chosen.logprob < 0
    assert chosen.top == ()


def cut(text, strings):
    """The specification of Stops: the text before the first stop string to be complete, and if it was met."""
    for end in range(len(text) + 1):
        if ending := [s for s in strings if text[:end].endswith(s)]:
            return text[: end - len(max(ending, key=len))], True
    return text, False


texts = st.text("ab", max_size=4)


@settings(max_examples=300)
@given(st.lists(texts, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stops_cut_the_same_however_the_text_is_split(pieces, strings):
    stops = Stops(strings)
    out = seen = ""
    for piece in pieces:
        out += stops.push(piece)
        seen += piece
        whole, found = cut(seen, strings)
        assert stops.found == found
        # No more is held back than what may yet turn out to be a stop string.
        held = [n for s in strings for n in range(1, len(s)) if whole.endswith(s[:n])]
        assert out == (whole if found or not held else whole[: -max(held)])
    assert (out + stops.finish(), stops.found) == cut("".join(pieces), strings)


def test_stops_across_pieces_by_hand():
    stops = Stops(["\nUser:", "</s>"])
    assert [stops.push(p) for p in ("Hi", "\n", "Us", "e", "d\n</", "b></", "s>x", "more")] == [
        "Hi", "", "", "", "\nUsed\n", "</b>", "", "",
    ]  # fmt: skip
    assert stops.found
    assert stops.finish() == ""
