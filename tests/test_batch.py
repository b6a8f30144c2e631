"""Several prompts at once: each gets the text that it would get alone."""

import gc
import itertools
import json
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fakes import Checksum, byte_tokenizer, checksum_llm, greedy, ids_of
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeq
from edgeq import ContextFull, EdgeqError
from edgeq.llm import LLM

PROMPTS = ["one", "two hundred", "3", "the fourth of them", "five"]
GREEDY = {"temperature": 0, "max_tokens": 12}


class Tally(Checksum):
    """A model that counts the sequences of each step, and ends a text sooner or later."""

    def __init__(self, fail_at=None, **options):
        super().__init__(**options)
        self.steps, self.fail_at = [], fail_at

    def step(self, ids, caches):
        self.steps.append(len(ids))
        if len(self.steps) == self.fail_at:
            raise KeyboardInterrupt
        return super().step(ids, caches)

    def after(self, ids):
        x = super().after(ids)
        x[2] = x.max() + np.float32(sum(ids) % 9 - 6)
        return x


def alone(prompts, **options):
    """The streams of prompts, one after the other, read to their ends."""
    llm = LLM(Tally(), byte_tokenizer())
    streams = [llm.stream(p, **options) for p in prompts]
    return [("".join(s), s.finish_reason, s.tokens) for s in streams]


@settings(max_examples=60)
@given(
    st.lists(st.text("abcd", min_size=1, max_size=6), max_size=9),
    st.integers(1, 5),
    st.sampled_from(
        [
            {"temperature": 0},
            {"seed": 7},
            {"seed": 7, "temperature": 3, "logprobs": 2, "max_tokens": 5},
            {"seed": 1, "stop": ["a", "bc"], "max_tokens": 40},
            {"seed": 1, "max_tokens": 300, "context_shift": True, "keep": 3, "logit_bias": {2: -100}},
        ]
    ),
    st.randoms(),
)
def test_company_changes_no_text(prompts, parallel, options, random):
    model = Tally()
    streams = LLM(model, byte_tokenizer()).streams(prompts, parallel=parallel, **options)
    texts = [""] * len(streams)
    reading = list(enumerate(streams))
    while reading:
        i, stream = random.choice(reading)
        piece = next(stream, None)
        if piece is None:
            reading.remove((i, stream))
        else:
            texts[i] += piece
    found = [(text, s.finish_reason, s.tokens) for text, s in zip(texts, streams, strict=True)]
    assert found == alone(prompts, **options)
    assert max(model.steps, default=0) <= parallel


def test_a_list_of_prompts_gets_a_list_of_texts():
    llm = checksum_llm()
    expected = [greedy(p, 12) for p in PROMPTS]
    assert llm.generate(PROMPTS, **GREEDY) == expected
    assert llm.generate(tuple(PROMPTS), **GREEDY) == expected
    assert llm.generate([ids_of(p) for p in PROMPTS], **GREEDY) == expected
    assert llm.generate(np.array([ids_of("one"), ids_of("two")]), **GREEDY) == [
        greedy("one", 12),
        greedy("two", 12),
    ]
    assert llm.generate(PROMPTS[:1], **GREEDY) == expected[:1]
    assert llm.streams([]) == []


def test_a_list_of_conversations_gets_a_list_of_answers():
    llm = checksum_llm()
    talks = [[{"role": "user", "content": p}] for p in PROMPTS]
    expected = [llm.chat(talk, **GREEDY) for talk in talks]
    assert llm.chat(talks, **GREEDY) == expected
    streams = llm.chat(talks, stream=True, parallel=2, **GREEDY)
    assert ["".join(s) for s in streams] == expected


def test_steps_are_shared_and_places_taken_over():
    model = Tally()
    llm = LLM(model, byte_tokenizer())
    options = {"temperature": 0, "max_tokens": 10, "logit_bias": {2: -100}}
    assert llm.generate(["a"] * 5, parallel=3, **options) == [greedy("a", 10)] * 5
    assert model.steps == [3] * 9 + [2] * 9
    assert (llm.timings.prompt_n + llm.timings.cache_n, llm.timings.predicted_n) == (5, 50)
    assert model.caches == 3


def test_full_steps_are_of_the_same_caches_in_the_same_order():
    steps = []

    class Spy(Tally):
        def step(self, ids, caches):
            steps.append(list(map(id, caches)))
            return super().step(ids, caches)

    LLM(Spy(), byte_tokenizer()).generate([c * 3 for c in "abcdefghijklmnop"], parallel=4, seed=1)
    full = [s for s in steps if len(s) == 4]
    assert len(full) > 20
    assert all(s == full[0] for s in full)
    assert all(set(later) < set(s) or later == s for s, later in itertools.pairwise(steps))


def test_a_place_keeps_what_prompts_share():
    llm = checksum_llm()
    prompts = [f"The same beginning, and then {i}" for i in range(10)]
    assert llm.generate(prompts, parallel=2, **GREEDY) == [greedy(p, 12) for p in prompts]
    assert llm.timings.cache_n == 8 * (len(prompts[0]) - 1)
    assert llm.timings.prompt_n == 2 * len(prompts[0]) + 8


def test_a_batch_leaves_the_cache_of_a_conversation_alone():
    llm = checksum_llm()
    llm.generate("A long story", **GREEDY)
    llm.generate(PROMPTS, **GREEDY)
    llm.generate("A long story goes on", **GREEDY)
    assert llm.timings.cache_n == len("A long story")


def test_each_prompt_may_have_its_seed():
    llm = checksum_llm()
    seeds = range(3)
    expected = [llm.generate("x", seed=s, max_tokens=20) for s in seeds]
    assert len(set(expected)) == 3
    assert llm.generate(["x"] * 3, seed=seeds, max_tokens=20) == expected
    assert llm.generate(["x"] * 3, seed=1, max_tokens=20) == [expected[1]] * 3
    assert len(set(llm.generate(["x"] * 3, max_tokens=20))) == 3
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        llm.generate(["x"] * 3, seed=[1, 2])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", ""], {}, "prompt 1: the prompt has no tokens"),
        (["a", "b" * 201], {}, "prompt 1: the prompt has 201 tokens, the context holds 200"),
        (["b" * 150, "a"], {"max_tokens": 60}, "prompt 0: a prompt of 150 tokens and max_tokens 60"),
        (["a"], {"temperature": -1}, "prompt 0: temperature is -1"),
        (["a"], {"parallel": 0}, "parallel is 0, expected at least 1"),
        (["a"], {"prompt_lookup": 4}, "prompt_lookup is for one prompt"),
    ],
)
def test_what_cannot_be_is_refused_at_the_call(prompts, options, message):
    llm = checksum_llm()
    with pytest.raises((ValueError, ContextFull), match=message):
        llm.streams(prompts, **options)
    assert llm._model.computed == 0


def test_progress_counts_answers():
    seen = []
    checksum_llm().generate(PROMPTS, parallel=2, progress=lambda *report: seen.append(report), **GREEDY)
    assert {(stage, total) for stage, _, total in seen} == {("answers", 5)}
    done = [d for _, d, _ in seen]
    assert done == sorted(done)
    assert set(done) == {0, *range(2, 6, 2), 5}


# the end of streams


def test_a_closed_stream_leaves_its_place():
    model = Tally()
    streams = LLM(model, byte_tokenizer()).streams(
        ["a", "b", "c", "d"], parallel=2, temperature=0, max_tokens=20, logit_bias={2: -100}
    )
    begun = next(streams[0])
    streams[1].close()
    streams[2].close()
    assert begun + "".join(streams[0]) == greedy("a", 20)
    assert "".join(streams[3]) == greedy("d", 20)
    assert list(streams[1]) == list(streams[2]) == []
    assert streams[1].finish_reason is None
    assert model.steps == [2] * 19  # a and d


def test_an_interrupt_ends_all_streams_and_no_other():
    model = Tally(fail_at=5)
    llm = LLM(model, byte_tokenizer())
    other = llm.stream("other", **GREEDY)
    begun = next(other)
    streams = llm.streams(PROMPTS, parallel=2, logit_bias={2: -100}, **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        "".join(streams[0])
    assert len(list(streams[1])) == 5
    assert [s.finish_reason for s in streams] == [None] * 5
    assert [list(s) for s in streams] == [[]] * 5
    model.fail_at = None
    assert begun + "".join(other) == alone(["other"], **GREEDY)[0][0]
    assert llm.generate(PROMPTS, **GREEDY) == [text for text, *_ in alone(PROMPTS, **GREEDY)]


def test_closing():
    llm = checksum_llm()
    streams = llm.streams(PROMPTS, parallel=2, **GREEDY)
    next(streams[0])
    held = [weakref.ref(llm.model), weakref.ref(llm.model.last_cache)]
    llm.close()
    with pytest.raises(EdgeqError, match="has been closed"):
        "".join(streams[0])
    del streams
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_threads_may_share_a_batch():
    prompts = [f"prompt {i}" for i in range(12)]
    for _ in range(5):
        streams = checksum_llm().streams(prompts, parallel=4, **GREEDY)
        with ThreadPoolExecutor(len(streams)) as pool:
            assert list(pool.map("".join, streams)) == [greedy(p, 12) for p in prompts]


# real models


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_stories260k_tells_all_stories_at_once(shared, stories260k, backend):
    cases = json.loads((shared / "data/golden/stories260k.json").read_text())["cases"]
    with edgeq.load(stories260k, backend=backend) as llm:
        n = len(cases[0]["greedy"])
        streams = llm.streams([c["prompt"] for c in cases], parallel=3, max_tokens=n, temperature=0)
        for case, stream in zip(cases, streams, strict=True):
            assert "".join(stream).lstrip() == case["greedy_text"].lstrip()
            assert [t.id for t in stream.tokens] == case["greedy"]


@pytest.mark.model
def test_smollm2_answers_several_as_one(smollm2_path):
    prompts = ["The capital of France is", "Once upon a time", "1, 1, 2, 3, 5, 8, 13,", "def add(a, b):"]
    with edgeq.load(smollm2_path, ctx=256) as llm:
        for options in ({"temperature": 0}, {"seed": 3}):
            expected = [llm.generate(p, max_tokens=16, **options) for p in prompts]
            assert llm.generate(prompts, parallel=3, max_tokens=16, **options) == expected
