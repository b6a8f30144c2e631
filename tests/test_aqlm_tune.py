"""Codebooks that learn: their gradients, and what becomes of a block's output."""

import numpy as np
import pytest
from folders import complete

import edgeq
from edgeq import formats, quantizers
from edgeq.formats.aqlm import pack
from edgeq.quantizers.layerwise import Calibration
from edgeq.tensor import Tensor
from edgeq.train import tape
from edgeq.train.backend import Frozen, Linear
from edgeq.train.codebooks import Block, Coded, decoded, tune
from edgeq.train.tape import Var

TEXT = "the 12 cats of 345 and the dog's tail. Then they went home, all of them! " * 40


def tensor(rng, rows=24, groups=4, count=2, size=16, group=8, name="w"):
    codes = rng.integers(0, size, (rows, groups, count))
    books = rng.standard_normal((count, size, group)).astype(np.float16)
    return pack(codes, books, rng.uniform(0.5, 1, rows).astype(np.float16))._replace(name=name)


@pytest.mark.parametrize("count", [1, 3])
def test_gradients(count):
    """The weights are linear in the codebooks, and in the factors: a difference is the gradient's part."""
    rng = np.random.default_rng(count)
    made = tensor(rng, count=count)
    coded = Coded([made])
    codes, scale = coded.codes[0], coded.scales[0]
    books, factors = (
        rng.standard_normal(v.shape).astype(np.float32) for v in (coded.books[0], coded.factors[0])
    )
    g = rng.standard_normal(made.shape).astype(np.float32)

    def weights(books, factors):
        w = decoded(codes, Var(books), scale, Var(factors))
        return w.value.astype(np.float64)

    vars = Var(books), Var(factors)
    tape.backward(decoded(codes, vars[0], scale, vars[1]), g)
    for i, var in enumerate(vars):
        step = rng.standard_normal(var.shape).astype(np.float32)
        moved = [books, factors]
        moved[i] = moved[i] + step
        found = np.vdot(g, weights(*moved) - weights(books, factors))
        assert np.vdot(var.grad, step) == pytest.approx(found, rel=1e-3, abs=1e-2)


def test_what_is_learned_is_what_is_stored():
    rng = np.random.default_rng(0)
    made = [tensor(rng, name="a"), tensor(rng, rows=40, name="b")]
    coded = Coded(made)
    for before, after in zip(made, coded.encoded(), strict=True):
        assert (before.name, before.format, before.shape) == (after.name, after.format, after.shape)
        np.testing.assert_array_equal(formats.dequantize(before), formats.dequantize(after))
    x = rng.standard_normal((5, 32)).astype(np.float32)
    expected = np.concatenate([x @ formats.dequantize(t).T for t in made], axis=1)
    np.testing.assert_allclose(coded(x).value, expected, rtol=1e-5, atol=1e-5)


class TwoMatrices:
    """A block whose second matrix can make up for errors of the first."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def __call__(self, x, sequences):
        h = self.first(x)
        a = tape.value(h)
        return self.second(tape.record(np.tanh(a), (h, lambda g: g / np.square(np.cosh(a)))))


def test_learning_brings_a_block_back():
    rng = np.random.default_rng(0)
    coded = [tensor(rng, rows=32), tensor(rng, rows=16)]
    w = [formats.dequantize(t) + 0.3 * rng.standard_normal(t.shape).astype(np.float32) for t in coded]
    plain = [Tensor("", "f32", a.shape, a.reshape(-1).view(np.uint8)) for a in w]
    old, new = (
        TwoMatrices(*(Linear(Frozen([t], hold=True), [t], None) for t in of)) for of in (plain, coded)
    )
    states = [rng.standard_normal((40, 32)).astype(np.float32) for _ in range(12)]

    def missed(chunks):
        pairs = [(old(states[i], ()), tape.value(new(states[i], ()))) for i in chunks]
        return sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(a).sum() for a, _ in pairs)

    seen, others = range(8), range(8, 12)
    before = missed(seen), missed(others)
    block = Block(old, new, ())
    block.learn(states, np.arange(120) % 8, 1e-2)
    learned = missed(seen)
    block.freeze()
    assert missed(seen) == pytest.approx(learned, rel=1e-2)  # as float16
    assert learned < 0.8 * before[0]
    assert missed(others) < 0.8 * before[1]


def test_whole_models(tmp_path):
    source, look = complete("llama", tmp_path / "llama"), Calibration(TEXT, chunks=6, ctx=32, backend="numpy")
    before = quantizers.plan(source, "copy")
    quick = {"bits": 4, "rounds": 1, "beam": 4}
    after = quantizers.layerwise.apply("aqlm", before, look, **quick)
    plans = before, after, tune(before, after, look, steps=30)
    at_once = quantizers.layerwise.apply("aqlm", before, look, **quick, tune=30)
    for a, b in zip(plans[2].recodings, at_once.recodings, strict=True):
        assert a.tensor.data.tobytes() == b.tensor.data.tobytes()
        assert all(np.array_equal(a.tensor.parts[key], b.tensor.parts[key]) for key in a.tensor.parts)
    ids = np.arange(32) % 100
    models = [quantizers.layerwise.model(plan, "numpy") for plan in plans]
    logits = [m(ids.tolist(), m.new_cache(32), "all") for m in models]
    assert np.square(logits[2] - logits[0]).sum() < np.square(logits[1] - logits[0]).sum()
    for old, new in zip(*(quantizers.layerwise.arranged(p).values() for p in plans[1:]), strict=True):
        np.testing.assert_array_equal(old.data, new.data)  # codes, and weights that are plain
        assert (old.format == "aqlm") == (old.parts.keys() == {"codebooks", "scale"})
    [path] = quantizers.write(plans[2], tmp_path / "made")
    with edgeq.load(path, backend="numpy") as llm:
        np.testing.assert_allclose(llm.logits(ids.tolist()), logits[2], atol=1e-4)
