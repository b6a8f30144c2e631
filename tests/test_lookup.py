"""Prompt lookup changes no text: on models made up of rules, with any options, and on real ones."""

import json
import zlib

import numpy as np
import pytest
from fakes import Script, byte_tokenizer, checksum_llm, ids_of
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeq
from edgeq.generate import Continuation, generate, lookup, reuse
from edgeq.generate.lookup import MOST, Lookup
from edgeq.generate.stream import Timings
from edgeq.kernels.cache import KVCache
from edgeq.llm import LLM
from edgeq.sample import make_sampler

VOCAB = 12
GREEDY = {"temperature": 0}
SAMPLING = [GREEDY, {"seed": 1}, {"seed": 2, "temperature": 2, "repeat_penalty": 1.3}]


class Clock:
    """Stands in for ``time``: each look at it takes a second, so that a check takes as long as a step."""

    now = 0

    def perf_counter(self):
        self.now += 1
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    monkeypatch.setattr(lookup, "time", CLOCK)


class Rule:
    """A model whose logits come of all tokens by a function; it counts what each call computes, and lets a
    call of several tokens take a few seconds more.
    """

    def __init__(self, after, interrupt_at=None, seconds=0):
        self.after, self.interrupt_at, self.seconds, self.calls = after, interrupt_at, seconds, []

    def __call__(self, ids, cache, logits="last"):
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        assert cache.length + len(ids) <= cache.capacity
        self.calls.append(len(ids))
        CLOCK.now += self.seconds * (len(ids) > 1)
        rows = []
        for i in ids:
            cache.tokens.append(i)
            rows.append(self.after(cache.tokens))
        return np.stack(rows if logits == "all" else rows[-1:])


def random_logits(ids):
    rng = np.random.default_rng(zlib.crc32(np.asarray(ids, np.int64).tobytes()))
    return rng.standard_normal(VOCAB).astype(np.float32)


def one_hot(token):
    return np.where(np.arange(VOCAB) == token, np.float32(9), np.float32(0))


def recent(n):
    """Logits that the last n tokens decide: texts soon repeat themselves."""
    return lambda ids: random_logits(ids[-n:])


def drifting(ids):
    """Logits that nearly repeat: the last token counts for much, all that came before for a little."""
    return random_logits(ids[-1:]) + random_logits(ids) / 8


def contrary(ids):
    """After the same two tokens, never what followed them the last time."""
    pairs = list(zip(ids, ids[1:], strict=False))
    return one_hot(pairs.count(tuple(ids[-2:])) % VOCAB)


class Run:
    """A prompt, of which `held` tokens are in the cache, goes on by a rule."""

    def __init__(
        self,
        after,
        prompt,
        *,
        lookup=0,
        held=0,
        capacity=80,
        sampling=GREEDY,
        interrupt_at=None,
        seconds=0,
        **options,
    ):
        self.model, self.cache = Rule(after, interrupt_at, seconds), KVCache(capacity, 1, 2, ())
        self.cache.tokens.extend(prompt[:held])
        self.timings, self.made = Timings(), []
        step = Lookup(self.model, prompt, lookup, self.timings) if lookup else None
        text = Continuation(self.cache, make_sampler(**sampling), **options)
        self.tokens = generate(self.model, text, prompt[held:], step=step)

    def finish(self):
        self.made.extend(self.tokens)
        return self


@settings(max_examples=150)
@given(
    st.sampled_from([random_logits, recent(1), recent(2), recent(3), drifting, contrary]),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40),
    st.integers(1, MOST),
    st.data(),
)
def test_no_token_changes(after, prompt, lookup, data):
    capacity = data.draw(st.integers(len(prompt), 80))
    options = {
        "capacity": capacity,
        "held": data.draw(st.integers(0, len(prompt) - 1)),
        "max_tokens": data.draw(st.integers(1, 120)),
        "logprobs": data.draw(st.sampled_from([None, 2])),
        "keep": data.draw(st.sampled_from([None, 0, capacity // 2] if capacity > 1 else [None])),
        "sampling": data.draw(st.sampled_from(SAMPLING)),
    }
    plain = Run(after, prompt, **options).finish()
    same = Run(after, prompt, lookup=lookup, **options).finish()
    assert same.made == plain.made
    assert same.cache.tokens == plain.cache.tokens
    assert max(same.model.calls[1:], default=0) <= 1 + lookup


def cycle(ids):
    """1, 2, 3, 4, 5, and again."""
    return one_hot(len(ids) % 5 + 1)


def test_what_repeats_takes_a_fraction_of_the_calls():
    run = Run(cycle, [1, 2, 3, 4, 5] * 2, lookup=7, capacity=500, max_tokens=400).finish()
    assert [t.id for t in run.made] == [1, 2, 3, 4, 5] * 80
    assert run.model.calls == [10, 1, *[8] * 50]
    assert run.timings.draft_n == 50 * 7
    assert run.timings.draft_n_accepted == 400 - 2 - 50


@pytest.mark.parametrize("seconds", [0.1, 1, 5])
def test_guessing_in_vain_ends(seconds):
    """What checks take over steps is lost; little of a text whose every token has a match."""
    run = Run(contrary, [0], lookup=8, capacity=2000, max_tokens=1500, seconds=seconds).finish()
    checks = sum(n > 1 for n in run.model.calls)
    assert checks * seconds < 0.06 * 1500
    assert run.timings.draft_n == sum(run.model.calls) - len(run.model.calls)
    assert run.timings.draft_n_accepted < 0.01 * 1500


def test_costly_checks_have_to_give_more():
    checks = [
        sum(n > 1 for n in Run(drifting, [0], lookup=5, max_tokens=70, seconds=s).finish().model.calls)
        for s in (0, 1, 10)
    ]
    assert checks == sorted(checks, reverse=True)
    assert checks[0] > 2 * checks[-1]


def test_guessing_begins_again_when_it_pays():
    run = Run(
        lambda ids: contrary(ids) if len(ids) < 900 else cycle(ids),
        [0],
        lookup=8,
        capacity=2000,
        max_tokens=1800,
        seconds=1,
    ).finish()
    assert len(run.model.calls) < 900 + 900 / 3


def test_an_interrupted_check_leaves_a_sound_cache():
    prompt = [1, 2, 3, 1, 2]
    plain = Run(recent(1), prompt, max_tokens=40).finish()
    for at in range(2, 8):
        run = Run(recent(1), prompt, lookup=3, interrupt_at=at, max_tokens=40)
        with pytest.raises(KeyboardInterrupt):
            run.finish()
        assert run.made == plain.made[: len(run.made)]
        ids = prompt + [t.id for t in run.made]
        assert run.cache.length == len(ids) - 1 == reuse(run.cache, ids)


# what users hold


def test_streams_end_and_stop_the_same():
    text = "over and over and over and over, until it is over.\nDone"
    for options in (
        {},
        {"stop": "over."},
        {"stop": [", u"], "max_tokens": 90},
        {"max_tokens": 21},
        {"logprobs": 1},
    ):
        plain, looked_up = (
            LLM(Script(text, prompt_n=1), byte_tokenizer()).stream("x", prompt_lookup=n, seed=3, **options)
            for n in (0, 5)
        )
        assert list(looked_up) == list(plain)
        assert (looked_up.finish_reason, looked_up.tokens) == (plain.finish_reason, plain.tokens)
        assert looked_up.timings.draft_n_accepted > 5


def test_a_prompt_in_the_cache_is_looked_up_as_well():
    llm = checksum_llm()
    prompt = "abcdefgh" * 8
    plain = llm.generate(prompt, seed=1, max_tokens=40)
    assert llm.generate(prompt, seed=1, max_tokens=40, prompt_lookup=3) == plain
    assert llm.timings.cache_n == len(prompt) - 1
    assert llm.timings.draft_n > 0


@pytest.mark.parametrize("lookup", [-1, 16])
def test_how_many_guesses_may_be_made(lookup):
    with pytest.raises(ValueError, match=f"prompt_lookup is {lookup}, expected 0 to 15"):
        checksum_llm().stream("x", prompt_lookup=lookup)


def test_closing_between_guesses():
    llm = LLM(Script("abcabcabcabcabcabc", prompt_n=1), byte_tokenizer())
    stream = llm.stream("x", prompt_lookup=6, temperature=0)
    text = [next(stream) for _ in range(8)]
    stream.close()
    assert llm._idle[0].tokens == ids_of("x" + "".join(text))[:-1]
    assert llm.generate("x", temperature=0) == "abcabcabcabcabcabc"


# real models

REPEAT = "the cat sat on the mat and the dog sat on the log and "


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_stories260k_tells_the_same_stories(shared, stories260k, backend):
    with edgeq.load(stories260k, backend=backend) as llm:
        cases = json.loads((shared / "data/golden/stories260k.json").read_text())["cases"]
        drafted = 0
        for case in cases:
            stream = llm.stream(
                case["prompt"], max_tokens=len(case["greedy"]), temperature=0, prompt_lookup=8
            )
            assert "".join(stream).lstrip() == case["greedy_text"].lstrip()
            assert [t.id for t in stream.tokens] == case["greedy"]
            drafted += stream.timings.draft_n
        for options in (
            {"temperature": 0},
            {"seed": 1},
            {"seed": 2, "temperature": 1.5, "repeat_penalty": 1.2},
        ):
            plain, looked_up = (
                llm.generate(REPEAT * 3, max_tokens=120, prompt_lookup=n, **options) for n in (0, 7)
            )
            assert looked_up == plain
            drafted += llm.timings.draft_n_accepted
        assert drafted > 100


@pytest.mark.model
@pytest.mark.parametrize(
    ("backend", "n", "sampling"), [("numpy", 8, [GREEDY]), ("numba", 48, [GREEDY, {"seed": 5}])]
)
def test_smollm2_says_the_same(smollm2_path, backend, n, sampling):
    prompt = (
        "Copy:\nred, green, blue, yellow, black, white\nred, green, blue, yellow, black, white\nred, green,"
    )
    with edgeq.load(smollm2_path, backend=backend, ctx=256) as llm:
        for options in sampling:
            plain, looked_up = (
                llm.generate(prompt, max_tokens=n, prompt_lookup=count, **options) for count in (0, 8)
            )
            assert looked_up == plain
            assert llm.timings.draft_n_accepted > 0
