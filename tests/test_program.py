"""Kernel calls made again without Python, and memory used again: neither may be seen in the results."""

from pathlib import Path

import numpy as np
import pytest

from edgeq import arch, files
from edgeq.kernels import numba_backend, scratch

GOLDEN = Path(__file__).parent / "golden" / "arch"
TINY = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())


def load(name):
    return arch.load(*files.read(GOLDEN / name), path=GOLDEN / name)


@pytest.fixture
def unrecorded(monkeypatch):
    """A switch that lets every call go through Python."""
    return lambda: monkeypatch.setattr(numba_backend, "again", lambda caches, what, x, compute: compute(x))


@pytest.mark.parametrize("name", TINY)
def test_a_recorded_token_is_bit_for_bit_the_computed_one(name, unrecorded):
    model = load(name)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, 40).tolist()
    recorded, cache = [], model.new_cache(64)
    for at in range(0, 40, 5):  # alone, and five together
        recorded += [model([i], cache) for i in ids[at : at + 5]]
        cache.truncate(at)
        recorded.append(model(ids[at : at + 5], cache, "all"))
    assert len(cache.programs) == 2
    assert all(isinstance(p, numba_backend.Program) for p in cache.programs.values())
    unrecorded()
    computed, cache = [], model.new_cache(64)
    for at in range(0, 40, 5):
        computed += [model([i], cache) for i in ids[at : at + 5]]
        cache.truncate(at)
        computed.append(model(ids[at : at + 5], cache, "all"))
    np.testing.assert_array_equal(np.concatenate(recorded), np.concatenate(computed))


@pytest.mark.parametrize("name", TINY)
def test_sequences_together_are_bit_for_bit_each_alone(name):
    model = load(name)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, model.config.vocab_size, n).tolist() for n in (3, 30, 7)]
    together, alone = ([model.new_cache(64) for _ in prompts] for _ in range(2))
    for caches in (together, alone):
        for prompt, cache in zip(prompts, caches, strict=True):
            model(prompt, cache)
    for ids in rng.integers(0, model.config.vocab_size, (6, 3)).tolist():
        got = model.step(ids, together)
        want = [model([i], cache) for i, cache in zip(ids, alone, strict=True)]
        np.testing.assert_array_equal(got, np.concatenate(want))
    # with one sequence less it is another computation
    got = model.step([1, 2], together[1:])
    np.testing.assert_array_equal(
        got, np.concatenate([model([i], c) for i, c in zip([1, 2], alone[1:], strict=True)])
    )


def test_a_result_stays_what_it_is():
    model = load("llama")
    cache = model.new_cache(32)
    results = [model([i], cache) for i in range(6)]
    copies = [r.copy() for r in results]
    for i in range(6):
        model([i + 6], cache)
    np.testing.assert_array_equal(np.concatenate(results), np.concatenate(copies))


def test_scratch_is_used_again_when_nobody_holds_it():
    first = scratch.empty((100, 300))
    view = first[3:, ::2]
    place = first.ctypes.data
    assert place % scratch.LINE == 0
    del first
    other = scratch.empty((100, 300))
    assert other.ctypes.data != place  # the view holds it
    del view
    again = scratch.empty((300, 100))
    assert again.ctypes.data == place
    assert not np.shares_memory(again, other)


def test_scratch_keeps_no_more_than_its_limit():
    held = [scratch.empty((1, scratch.MOST // 16)) for _ in range(12)]
    assert len({a.ctypes.data for a in held}) == 12
    held.clear()
    kept = scratch.empty((1, scratch.MOST // 2))
    assert sum(b.nbytes for b in scratch.blocks) <= scratch.MOST + kept.nbytes
