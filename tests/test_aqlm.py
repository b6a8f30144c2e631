"""AQLM: the paper's properties, and its loops against exhaustive search and dense least squares."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import additive, formats
from edgeq.additive import tables
from edgeq.formats.aqlm import decode
from edgeq.grid import decode as decode_grid
from edgeq.kernels import additive as compiled
from edgeq.kernels import pool
from edgeq.quantizers.aqlm import Layer, aqlm, kmeans, refit, rescale, search, with_feedback
from edgeq.quantizers.gptq import gptq
from edgeq.quantizers.objective import damped, error
from edgeq.quantizers.target import target

LOOPS = [additive, compiled]
QUICK = {"bits": 4, "rounds": 3, "beam": 4}


def matrix(rows=32, cols=64, tokens=700, seed=0):
    """Weights, and XXᵀ of inputs that depend on each other and are not equally large."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, cols)) @ (
        rng.standard_normal((cols, cols)) / np.sqrt(cols) + np.eye(cols) / 2
    )
    x *= np.exp(rng.standard_normal(cols) / 2)
    return rng.standard_normal((rows, cols)).astype(np.float32) / 20, (x.T @ x).astype(np.float32)


def problem(rows=12, groups=4, count=2, size=16, group=8, seed=0, loops=additive):
    """A layer, and random codes, codebooks and scales for it."""
    rng = np.random.default_rng(seed)
    w, h = matrix(rows, groups * group, seed=seed)
    h = damped(h, 0.01)
    books = rng.standard_normal((count, size, group)).astype(np.float16).astype(np.float32) / 20
    scale = rng.uniform(0.5, 1, rows).astype(np.float16).astype(np.float32)
    codes = rng.integers(0, size, (rows, groups, count)).astype(np.int32)
    return Layer(w, h, loops.times(h), loops), codes, books, scale


@pytest.mark.parametrize(
    "scheme", [(1, 4, 8), (2, 4, 8), (3, 5, 8), (4, 4, 16), (1, 7, 4), (2, 4, 5)], ids=str
)
def test_the_error_falls_with_every_round(scheme):
    count, bits, group = scheme
    w, h = matrix(cols=80)
    found = aqlm(w, h, codebooks=count, bits=bits, group=group, rounds=5, tolerance=0)
    assert len(found.errors) > 2
    assert all(b < a for a, b in itertools.pairwise(found.errors[:3]))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(found.errors))
    assert found.codes.shape == (32, 80 // group, count)
    assert found.codes.min() >= 0
    assert found.codes.max() < 1 << bits
    assert found.codebooks.shape == (count, 1 << bits, group)
    assert found.codebooks.dtype == found.scale.dtype == np.float16
    # what is measured is what a file stores
    made = formats.dequantize(formats.get("aqlm").pack(*found[:3]))
    np.testing.assert_array_equal(made, decode(*found[:3]))
    assert error(w, made, damped(h, 0.01)) <= found.errors[-1] * (1 + 1e-5)


@pytest.mark.parametrize("loops", LOOPS)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_each_step_does_not_raise_the_error(loops, count, seed):
    layer, codes, books, scale = problem(count=count, seed=seed, loops=loops)

    def now():
        return layer.error(layer.w - decode(codes, books, scale))

    errors = [now()]
    for _ in range(3):
        search(layer, codes, books, scale, 4)
        errors.append(now())
        books = refit(layer, codes, books, scale)
        errors.append(now())
        scale = rescale(layer, codes, books, scale)
        errors.append(now())
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("loops", LOOPS)
@given(
    count=st.integers(1, 3),
    group=st.integers(1, 9),
    rows=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    threads=st.integers(1, 3),
)
@settings(max_examples=25)
def test_a_wide_beam_finds_the_best_codes(loops, count, group, rows, seed, threads):
    rng = np.random.default_rng(seed)
    size = 16
    x = rng.standard_normal((20, group))
    h = (x.T @ x).astype(np.float32)
    books = rng.standard_normal((count, size, group)).astype(np.float32)
    scale, target = rng.uniform(0.5, 2, rows).astype(np.float32), rng.standard_normal((rows, group)) * 2
    every = np.array(list(itertools.product(range(size), repeat=count)))
    sums = sum(books[m][every[:, m]] for m in range(count)).astype(np.float64)

    def costs(row):
        left = target[row] - scale[row] * sums
        return np.einsum("ij,jk,ik->i", left, h, left)

    codes = rng.integers(0, size, (rows, count)).astype(np.int32)
    b = (target @ h).astype(np.float32)
    with pool.computing(threads):
        loops.choose(b, scale, tables(books, h), codes, size ** (count - 1))
    for row in range(rows):
        cost = costs(row)
        mine = np.ravel_multi_index(codes[row], (size,) * count)
        assert cost[mine] <= cost.min() + 1e-4 * (1 + target[row] @ h @ target[row])


@pytest.mark.parametrize("loops", LOOPS)
def test_a_wider_beam_of_two_codebooks_finds_no_worse(loops):
    """What a narrow one keeps of the first a wide one keeps, too, and all of the second is tried."""
    layer, codes, books, scale = problem(rows=50, groups=1, size=32, loops=loops)
    found = []
    for beam in (1, 2, 4, 8, 32):
        mine = codes[:, 0].copy()
        loops.choose(
            (layer.w @ layer.h).astype(np.float32),
            scale,
            tables(books, layer.h.astype(np.float32)),
            mine,
            beam,
        )
        left = layer.w - decode(mine[:, None], books, scale)
        found.append(np.einsum("ij,jk,ik->i", left, layer.h, left))
    for narrow, wide in itertools.pairwise(found):
        assert (wide <= narrow * (1 + 1e-5)).all()
    assert found[-1].sum() < 0.9 * found[0].sum()


@given(
    rows=st.integers(1, 70),
    count=st.integers(1, 4),
    group=st.integers(1, 20),
    beam=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    threads=st.integers(1, 3),
)
@settings(max_examples=40)
def test_compiled_loops_are_the_same(rows, count, group, beam, seed, threads):
    """In numbers of which all sums are exact."""
    rng = np.random.default_rng(seed)
    books = rng.integers(-3, 4, (count, 32, group)).astype(np.float32)
    h = rng.integers(-2, 3, (group, group)).astype(np.float32)
    of, scale = tables(books, h @ h.T), rng.choice([0, 0.5, 1, 2], rows).astype(np.float32)
    b = rng.integers(-50, 50, (rows, group)).astype(np.float32)
    codes = rng.integers(0, 32, (rows, count)).astype(np.int32)
    twin = codes.copy()
    additive.choose(b, scale, of, twin, beam)
    with pool.computing(threads):
        compiled.choose(b, scale, of, codes, beam)
    np.testing.assert_array_equal(codes, twin)


@given(rows=st.integers(1, 50), cols=st.integers(1, 70), seed=st.integers(0, 99), threads=st.integers(1, 3))
@settings(max_examples=30)
def test_compiled_products(rows, cols, seed, threads):
    rng = np.random.default_rng(seed)
    x, h = rng.standard_normal((rows, cols)).astype(np.float32), rng.standard_normal((cols, cols))
    h = h + h.T
    start, stop = sorted(rng.integers(0, cols + 1, 2).tolist())
    for span in ((), (start, stop), (start,)):
        want = additive.times(h)(x, *span)
        with pool.computing(threads):
            got = compiled.times(h)(x, *span)
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_same_seed_gives_the_same_bytes_whatever_the_threads():
    w, h = matrix(rows=70, cols=136)
    made = []
    for threads in (1, 2, 3, 4):
        with pool.computing(threads):
            made.append(aqlm(w, h, **QUICK))
    for other in made[1:]:
        for a, b in zip(made[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(aqlm(w, h, **QUICK, seed=1).codes, made[0].codes)


@pytest.mark.parametrize("seed", range(3))
def test_compiled_is_as_good(seed):
    w, h = matrix(seed=seed)
    slow, fast = (aqlm(w, h, **QUICK, compiled=c) for c in (False, True))
    assert fast.errors == pytest.approx(slow.errors, rel=0.03)


@pytest.mark.parametrize("count", [1, 2])
def test_codebooks_are_those_of_least_squares(count):
    """Against the dense normal equations."""
    layer, codes, books, scale = problem(rows=30, count=count, size=4, seed=1)
    rows, groups, _ = codes.shape
    size, group = books.shape[1:]
    design = np.zeros((rows, groups, group, count, size, group))
    for i, j, m in np.ndindex(rows, groups, count):
        design[i, j, :, m, codes[i, j, m]] = np.eye(group) * scale[i]
    a = design.reshape(rows, groups * group, -1)
    root = np.linalg.cholesky(layer.h)
    x, *_ = np.linalg.lstsq(
        np.concatenate([root.T @ row for row in a]), np.concatenate([root.T @ row for row in layer.w])
    )
    best = layer.error((layer.w - a @ x).astype(np.float32))
    made = refit(layer, codes, books, scale, steps=200)
    assert layer.error(layer.w - decode(codes, made, scale)) == pytest.approx(best, rel=1e-3)
    # a few steps are nearly as good
    few = refit(layer, codes, books, scale)
    assert layer.error(layer.w - decode(codes, few, scale)) < 1.05 * best


def test_scales_are_those_of_least_squares():
    layer, codes, books, scale = problem(seed=3)
    made = rescale(layer, codes, books, scale)
    u, root = decode(codes, books, np.ones_like(scale)), np.linalg.cholesky(layer.h)
    for i, s in enumerate(made):
        best = np.linalg.lstsq((u[i] @ root)[:, None], layer.w[i] @ root)[0][0]
        assert s == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("loops", LOOPS)
def test_kmeans_finds_clusters(loops):
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((16, 8)).astype(np.float32) * 10
    x = centers[rng.integers(0, 16, 900)] + rng.standard_normal((900, 8)).astype(np.float32) / 100
    codes, found = kmeans(x, 64, rng, loops)
    assert np.abs(x - found[codes]).max() < 0.1
    distances = np.square(x[:, None] - found[None]).sum(axis=2)
    rounding = 1e-6 * np.square(x).sum(axis=1)
    assert (distances[np.arange(900), codes] <= distances.min(axis=1) + rounding).all()


def test_fewer_points_than_rows_of_a_codebook():
    w, h = matrix(rows=2, cols=16)
    found = aqlm(w, h, codebooks=1, bits=6, rounds=1)
    assert found.errors[-1] < 1e-4  # every group has a row of its own


def test_feedback_is_a_better_start():
    layer, codes, books, scale = problem(rows=64, groups=8, count=1, size=64)
    plain = codes.copy()
    search(layer, plain, books, scale, 1)
    with_feedback(layer, codes, books, scale, 1, 0)
    assert layer.error(layer.w - decode(codes, books, scale)) < layer.error(
        layer.w - decode(plain, books, scale)
    )


def test_better_than_two_bits_a_weight_on_a_grid():
    """With an identity for H, a scalar grid cannot use that two dimensions are better covered together."""
    w, h = matrix(rows=512, cols=256)
    codes, grid = gptq(w, h, target("i2", 256, per=32, symmetric=False))
    scalar = error(w, decode_grid(codes, grid), h)
    found = aqlm(w, h, rounds=3)
    assert error(w, decode(*found[:3]), h) < 0.7 * scalar


def test_rows_of_zeros_stay_zero():
    w, h = matrix()
    w[[3, 17]] = 0
    made = decode(*aqlm(w, h, **QUICK)[:3])
    assert not made[[3, 17]].any()
    nothing = aqlm(np.zeros_like(w), h, **QUICK)
    assert not decode(*nothing[:3]).any()


def test_inputs_that_were_always_zero():
    w, h = matrix()
    h[[3, 40]] = 0
    h[:, [3, 40]] = 0
    assert aqlm(w, h, **QUICK).errors[-1] < 0.5


def test_unsound_input():
    w, h = matrix()
    with pytest.raises(ValueError, match="all inputs were zero"):
        aqlm(w, np.zeros_like(h))
    with pytest.raises(ValueError, match="no finite numbers, or negative squares"):
        aqlm(w, np.where(h == h[0, 0], np.nan, h))
    x = np.ones((3, 64))
    with pytest.raises(ValueError, match="not positive definite with damping 0: .* more text, or damp more"):
        aqlm(w, x.T @ x - 1e-3 * np.eye(64), damp=0)
    with pytest.raises(ValueError, match="weights that are no finite numbers"):
        aqlm(w * np.inf, h)
    with pytest.raises(ValueError, match="weights beyond float16"):
        aqlm(w * 1e8, h)
    with pytest.raises(ValueError, match="64 columns are no whole groups of 24"):
        aqlm(w, h, group=24)
    with pytest.raises(ValueError, match="1 codebooks of 17 bits"):
        aqlm(w, h, codebooks=1, bits=17)
    with pytest.raises(ValueError, match="2 codebooks of 16 bits have more than 8,192 rows"):
        aqlm(w, h, bits=16)
