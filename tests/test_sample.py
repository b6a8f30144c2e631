"""Samplers: each pure function by hand, by property, and against Transformers' logits processors."""

import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import EdgeqError, sample

FOUR = np.log(np.float32([0.1, 0.4, 0.2, 0.3]))

# Transformers 5.23.0 made from these logits: TopKLogitsWarper(k), TopPLogitsWarper(p), MinPLogitsWarper(p),
# TypicalLogitsWarper(p), RepetitionPenaltyLogitsProcessor(penalty) and torch.log_softmax.
TWELVE = np.float32([2, -1.5, 0.25, 3.5, -0.75, 1.125, 3.25, -4, 0.5, 2.625, -2.25, 1.75])
KEPT = [
    (sample.keep_top_k, 1, [3]),
    (sample.keep_top_k, 3, [3, 6, 9]),
    (sample.keep_top_k, 7, [0, 3, 5, 6, 8, 9, 11]),
    (sample.keep_top_p, 0.1, [3]),
    (sample.keep_top_p, 0.4, [3, 6]),
    (sample.keep_top_p, 0.9, [0, 3, 6, 9, 11]),
    (sample.keep_top_p, 0.99, [0, 2, 3, 5, 6, 8, 9, 11]),
    (sample.keep_min_p, 0.01, [0, 2, 3, 4, 5, 6, 8, 9, 11]),
    (sample.keep_min_p, 0.05, [0, 3, 5, 6, 9, 11]),
    (sample.keep_min_p, 0.3, [3, 6, 9]),
    (sample.keep_min_p, 0.9, [3]),
    (sample.keep_typical, 0.1, [9]),
    (sample.keep_typical, 0.4, [6, 9]),
    (sample.keep_typical, 0.6, [3, 6, 9]),
    (sample.keep_typical, 0.9, [0, 3, 6, 9, 11]),
    (sample.keep_typical, 0.99, [0, 2, 3, 5, 6, 8, 9, 11]),
]
PENALIZED = [
    (1.3, [3, 1, 3, 7], {1: -1.9499999, 3: 2.6923077, 7: -5.1999998}),
    (0.8, [0, 4], {0: 2.5, 4: -0.6}),
]
LOGPROBS = [-2.5292196, -6.0292196, -4.2792196, -1.0292196, -5.2792196, -3.4042196]
LOGPROBS += [-1.2792196, -8.5292196, -4.0292196, -1.9042196, -6.7792196, -2.7792196]
# top_k 8, typical 0.97, top_p 0.9, min_p 0.1, temperature 0.7 one after the other, then softmax
CHAIN = {0: 0.0536787, 3: 0.4575441, 6: 0.3201310, 9: 0.1310886, 11: 0.0375575}


class Fixed:
    """A random generator whose every number is the same."""

    def __init__(self, u):
        self.u = u

    def random(self):
        return self.u


def logits_of(size, seed, ties):
    """Random logits; with ties, from a handful of values."""
    x = np.random.default_rng(seed).standard_normal(size) * 4
    return np.float32(np.round(x) if ties else x)


vocabularies = st.builds(logits_of, st.integers(1, 6000), st.integers(0, 99), st.booleans())


@pytest.mark.parametrize(
    ("keep", "value", "expected"),
    [
        (sample.keep_top_k, 2, [1, 3]),
        (sample.keep_top_k, 9, [1, 3, 2, 0]),
        (sample.keep_top_p, 0, [1]),
        (sample.keep_top_p, 0.35, [1]),
        (sample.keep_top_p, 0.65, [1, 3]),
        (sample.keep_top_p, 0.75, [1, 3, 2]),
        (sample.keep_min_p, 0.45, [1, 2, 3]),  # 0.45 * 0.4 = 0.18
        (sample.keep_min_p, 0.55, [1, 3]),  # 0.55 * 0.4 = 0.22
        (sample.keep_min_p, 1, [1]),
        # entropy 1.280; surprises 2.303, 0.916, 1.609, 1.204; distances 1.023, 0.364, 0.330, 0.076
        (sample.keep_typical, 0.25, [3]),
        (sample.keep_typical, 0.45, [3, 2]),
        (sample.keep_typical, 0.55, [3, 2, 1]),
    ],
)
def test_filters_by_hand(keep, value, expected):
    assert keep(FOUR, value).tolist() == expected


@pytest.mark.parametrize(("keep", "value", "expected"), KEPT)
def test_filters_as_transformers(keep, value, expected):
    assert sorted(keep(TWELVE, value).tolist()) == expected


def test_equal_logits_keep_the_first():
    assert sample.keep_top_k(np.float32([1, 2, 2, 2]), 2).tolist() == [1, 2]
    many = np.zeros(100_000, np.float32)
    assert sample.keep_top_k(many, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("keep", [sample.keep_top_p, sample.keep_typical])
def test_banned_tokens_are_never_needed(keep):
    x = np.float32([-np.inf, 1, -np.inf, 1])
    assert sorted(keep(x, 0.99).tolist()) == [1, 3]


def test_penalties_by_hand():
    x = np.float32([2, -2, 1, 0])
    y = sample.penalize(x, [0, 1, 0], repeat=2, presence=0.5, frequency=0.25)
    # 2 / 2 - 0.5 - 2 * 0.25;  -2 * 2 - 0.5 - 0.25
    assert y.tolist() == [0, -4.75, 1, 0]
    assert y.dtype == np.float32
    assert x.tolist() == [2, -2, 1, 0]
    assert sample.penalize(x, [], repeat=2, presence=1, frequency=1).tolist() == x.tolist()


@pytest.mark.parametrize(("penalty", "recent", "changed"), PENALIZED)
def test_repeat_penalty_as_transformers(penalty, recent, changed):
    expected = TWELVE.copy()
    expected[list(changed)] = list(changed.values())
    np.testing.assert_allclose(
        sample.penalize(TWELVE, recent, repeat=penalty, presence=0, frequency=0), expected, rtol=1e-6
    )


def test_bias():
    x = np.float32([0, 1, 2, 3])
    assert sample.add_bias(x, {3: -math.inf, 0: 1.5}).tolist() == [1.5, 1, 2, -math.inf]
    assert x.tolist() == [0, 1, 2, 3]
    for outside in (4, -1):
        with pytest.raises(ValueError, match=f"token {outside}, expected 0 to 3"):
            sample.add_bias(x, {outside: 1})


def test_log_softmax():
    np.testing.assert_allclose(sample.log_softmax(TWELVE), LOGPROBS, atol=1e-6)
    assert sample.log_softmax(np.float32([1e30, -np.inf])).tolist() == [0, -np.inf]


@pytest.mark.parametrize(
    ("u", "expected"), [(0, 0), (0.09, 0), (0.11, 1), (0.49, 1), (0.51, 2), (0.71, 3), (1 - 2**-53, 3)]
)
def test_draw_inverts_the_running_sum(u, expected):
    assert sample.draw(FOUR, Fixed(u)) == expected


@pytest.mark.parametrize("u", [0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("size", [1, 511, 512, 513, 2000])
def test_draw_meets_only_possible_tokens(size, u):
    x = np.full(size, -np.inf, np.float32)
    x[size // 2] = 3
    assert sample.draw(x, Fixed(u)) == size // 2


def test_draw_follows_the_probabilities():
    p = np.random.default_rng(1).dirichlet(np.ones(1500))
    rng = np.random.default_rng(2)
    drawn = np.bincount([sample.draw(np.log(p).astype(np.float32), rng) for _ in range(6000)], minlength=1500)
    expected = p.reshape(15, 100).sum(axis=1) * 6000
    chi2 = np.sum((drawn.reshape(15, 100).sum(axis=1) - expected) ** 2 / expected)
    assert chi2 < 36.1  # 99.9 % of 14 degrees of freedom


@settings(deadline=None, max_examples=60)
@given(vocabularies, st.integers(1, 300))
def test_top_k_is_the_head_of_a_stable_sort(x, k):
    assert sample.keep_top_k(x, k).tolist() == np.argsort(-x, kind="stable")[:k].tolist()


@settings(deadline=None, max_examples=60)
@given(vocabularies, st.floats(0, 1))
def test_top_p_is_the_smallest_head_that_holds_p(x, p):
    kept = sample.keep_top_p(x, p)
    assert kept.tolist() == np.argsort(-x, kind="stable")[: len(kept)].tolist()
    probs = np.exp(x.astype(np.float64) - x.max())
    probs /= probs.sum()
    assert probs[kept].sum() >= p - 1e-5
    assert probs[kept[:-1]].sum() < p + 1e-5


@settings(deadline=None, max_examples=60)
@given(vocabularies, st.floats(0, 1))
def test_typical_keeps_the_nearest_surprises(x, p):
    kept = sample.keep_typical(x, p)
    logp = sample.log_softmax(x).astype(np.float64)
    probs = np.exp(logp)
    distance = np.abs(logp - (probs * logp).sum())
    assert distance[kept].max() <= np.delete(distance, kept).min(initial=np.inf) + 1e-4
    assert probs[kept].sum() >= p - 1e-5
    assert probs[kept[:-1]].sum() < p + 1e-5


@settings(deadline=None, max_examples=60)
@given(vocabularies, st.floats(0.001, 1))
def test_min_p_compares_with_the_best(x, p):
    probs = np.exp(x.astype(np.float64) - x.max())
    kept = sample.keep_min_p(x, p)
    assert (probs[kept] >= p * (1 - 1e-5)).all()
    assert (np.delete(probs, kept) < p * (1 + 1e-5)).all()


@settings(deadline=None, max_examples=60)
@given(
    vocabularies,
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0, 1e-60, 1e-3, 0.8, 5, 1000]),
            "top_k": st.sampled_from([0, 1, 40]),
            "top_p": st.sampled_from([0, 0.9, 1]),
            "min_p": st.sampled_from([0, 0.05, 1]),
            "typical_p": st.sampled_from([0, 0.5, 1]),
            "repeat_penalty": st.sampled_from([0.5, 1, 1.2]),
            "frequency_penalty": st.sampled_from([-1, 0, 1]),
            "seed": st.integers(0, 9),
        }
    ),
)
def test_any_options_give_a_token_and_the_same_again(x, options):
    history = [0, x.size - 1, 0]
    before = x.copy()
    first, again = (sample.make_sampler(**options) for _ in range(2))
    ids = [first(x, history) for _ in range(3)]
    assert ids == [again(x, history) for _ in range(3)]
    assert all(type(i) is int and 0 <= i < x.size for i in ids)
    assert (x == before).all()


def test_temperature_zero_is_greedy_after_bias_and_penalties():
    x = np.float32([1, 4, 3, 2])
    assert sample.make_sampler(temperature=0)(x, []) == 1
    assert sample.make_sampler(temperature=0, repeat_penalty=2)(x, [1]) == 2
    assert sample.make_sampler(temperature=0, logit_bias={0: 9})(x, []) == 0
    assert sample.make_sampler(temperature=0, logit_bias={1: -math.inf})(x, []) == 2


def test_recent_is_the_last_n():
    x = np.float32([3, 2, 1, 0])
    history = [0, 1, 1, 1]
    options = {"temperature": 0, "presence_penalty": 5.0}
    assert sample.make_sampler(**options, repeat_last_n=3)(x, history) == 0
    assert sample.make_sampler(**options, repeat_last_n=4)(x, history) == 2
    assert sample.make_sampler(**options, repeat_last_n=-1)(x, history) == 2
    assert sample.make_sampler(**options, repeat_last_n=0)(x, history) == 0


def test_filters_chain_as_in_transformers():
    s = sample.make_sampler(temperature=0.7, top_k=8, typical_p=0.97, top_p=0.9, min_p=0.1, seed=0)
    n = 4000
    drawn = np.bincount([s(TWELVE, []) for _ in range(n)], minlength=12)
    expected = np.zeros(12)
    expected[list(CHAIN)] = list(CHAIN.values())
    assert (drawn[expected == 0] == 0).all()
    assert (np.abs(drawn / n - expected) <= 4 * np.sqrt(expected / n)).all()  # four standard deviations


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 0, "repeat_penalty": 1.1}])
def test_logits_that_are_no_numbers_are_an_error(bad, options):
    x = np.zeros(1000, np.float32)
    x[777] = bad
    with pytest.raises(EdgeqError, match=f"largest logit is {bad}, expected a finite number"):
        sample.make_sampler(**options)(x, [1])


def test_banning_everything_is_an_error():
    with pytest.raises(EdgeqError, match="logit_bias leaves no token"):
        sample.make_sampler(logit_bias={0: -math.inf, 1: -math.inf})(np.zeros(2, np.float32), [])


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"typical_p": 2},
        {"repeat_penalty": 0},
        {"repeat_last_n": -2},
        {"presence_penalty": math.nan},
    ],
)
def test_options_out_of_range_are_named(option):
    (name, value) = next(iter(option.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}, expected"):
        sample.make_sampler(**option)


def test_sampling_lists_the_options_of_make_sampler():
    assert list(sample.Sampling.__annotations__) == list(inspect.signature(sample.make_sampler).parameters)
