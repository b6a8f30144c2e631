"""Uniform, binary and ternary grids: the literature's worked examples, and what each rule is to minimize."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import formats, kernels, ranges, uniform
from edgeq.formats import binary, ternary
from edgeq.grid import decode, encode
from edgeq.kernels import lanes
from edgeq.kernels import ranges as compiled

BITS = (2, 3, 4, 8)
RULES = {
    "minmax": ranges.minmax,
    "percentile": ranges.percentile,
    "mse": ranges.mse,
    "entropy": ranges.entropy,
}


def normal(rows: int = 8, cols: int = 256, seed: int = 0) -> np.ndarray:
    """float32 (rows, cols)"""
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def squared(w: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """Squared error of each row on the grid of a range."""
    return ((w - ranges.rounded(w, low, high, bits, symmetric)) ** 2).sum(axis=1)


# ---- worked examples


def test_from_0_to_1000_in_8_bits():
    scale, zero = ranges.grid_parameters(np.float32(0), np.float32(1000), 8, False)
    assert round(float(scale), 2) == 3.92
    assert zero == 0


def test_from_minus_20_to_1000_in_8_bits():
    w = np.array([[-20, 0, 1000]], np.float32)
    scale, zero = ranges.grid_parameters(w.min(), w.max(), 8, False)
    assert scale == 4.0
    assert zero == 5
    grid = uniform.fit(w, 8, symmetric=False)
    codes = encode(w, grid)
    np.testing.assert_array_equal(codes, [[0, 5, 255]])
    np.testing.assert_array_equal(decode(codes, grid), w)


def test_symmetric_8_bits():
    """The largest magnitude becomes 127, of either sign."""
    grid = uniform.fit(np.array([[-254, 3, 100]], np.float32), 8)
    assert grid.scale == 2
    assert grid.offset is None
    np.testing.assert_array_equal(encode(np.array([[-254, 254, 3]], np.float32), grid), [[1, 255, 130]])


def test_a_range_without_zero_is_widened_to_it():
    scale, zero = ranges.grid_parameters(np.float32(10), np.float32(30), 4, False)
    assert scale == 2
    assert zero == 0


def test_threshold_of_ternary_weights():
    """Mean magnitude 1, so what is beyond 0.7 counts: 2, 1.5 and -0.9, with the mean 4.4 / 3."""
    w = np.array([[2, 1.5, -0.9, 0.5, -0.1]], np.float32)
    codes, grid = ternary.threshold(w)
    np.testing.assert_array_equal(codes, [[2, 2, 0, 1, 1]])
    np.testing.assert_allclose(grid.scale, [[4.4 / 3]], rtol=1e-6)


def test_mean_magnitude_of_ternary_weights():
    """BitNet: round(w / mean |w|), between -1 and 1."""
    w = np.array([[2, 1.5, -0.9, 0.5, -0.1]], np.float32)
    grid = ternary.fit(w)
    np.testing.assert_array_equal(grid.scale, [[1]])
    np.testing.assert_array_equal(encode(w, grid).astype(int) - 1, np.clip(np.rint(w), -1, 1))


def test_binary_weights():
    w = np.array([[2, -1, 0.5, -0.5]], np.float32)
    grid = binary.fit(w)
    np.testing.assert_array_equal(decode(encode(w, grid), grid), [[1, -1, 1, -1]])


# ---- what each rule is for


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=5)
def test_ranges_lie_within_the_values(rule, bits, symmetric, seed):
    w = normal(3, 100, seed)
    low, high = RULES[rule](w, bits, symmetric)
    assert low.shape == high.shape == (3, 1)
    assert low.dtype == high.dtype == np.float32
    largest = np.abs(w).max(axis=1, keepdims=True)
    assert (low >= -largest).all()
    assert (high <= largest).all()
    assert (low < high).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_mse_has_the_least_error_of_all_rules(bits, symmetric):
    w = np.random.default_rng(0).standard_t(4, (16, 512)).astype(np.float32)
    best = squared(w, *ranges.mse(w, bits, symmetric), bits, symmetric)
    for rule in (ranges.minmax, ranges.percentile, ranges.entropy):
        assert best.sum() <= squared(w, *rule(w, bits, symmetric), bits, symmetric).sum() * 1.001


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from((1, *BITS)),
    st.booleans(),
    st.sampled_from(["none", "all", "shared", "nothing"]),
    st.integers(0, 2**32 - 1),
)
def test_mse_compiled_is_the_same(n, size, bits, symmetric, weighed, seed):
    rng = np.random.default_rng(seed)
    w = normal(n, size, seed) * rng.lognormal(0, 8, (n, 1)).astype("f4")
    w[rng.random(n) < 0.1] = rng.choice([0.0, 0.5, 1e-42])
    importance = {
        "none": None,
        "all": rng.lognormal(0, 2, (n, size)).astype("f4"),
        "shared": np.broadcast_to(rng.lognormal(0, 2, size).astype("f4"), w.shape),
        "nothing": np.zeros((n, size), "f4"),
    }[weighed]
    for found, expected in zip(
        compiled.mse(w, bits, symmetric, importance), ranges.mse(w, bits, symmetric, importance), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_mse_minds_the_importance():
    w = np.append(normal(1, 255), 100).astype(np.float32)[None]
    importance = np.ones_like(w)
    low, high = ranges.mse(w, 4, True, importance)
    importance[0, -1] = 1e-9
    assert ranges.mse(w, 4, True, importance)[1] < high


def test_percentile_is_numpys():
    w = normal(4, 1000)
    low, high = ranges.percentile(w, 8, False, percent=98)
    np.testing.assert_allclose(low, np.percentile(w, 1, axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(high, np.percentile(w, 99, axis=1, keepdims=True), rtol=1e-6)
    low, high = ranges.percentile(w, 8, True, percent=98)
    np.testing.assert_allclose(high, np.percentile(np.abs(w), 98, axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(low, -high)


def test_entropy_clips_the_tail_and_not_the_bulk():
    """Values that fill their range evenly are all kept; of a normal distribution with a few far outliers the
    outliers are not.
    """
    even = np.linspace(-1, 1, 4096, dtype=np.float32)[None]
    low, high = ranges.entropy(even, 8, True)
    assert high > 0.95
    tailed = np.append(normal(1, 20000), [80, -90]).astype(np.float32)[None]
    low, high = ranges.entropy(tailed, 8, True)
    assert 2.5 < high < 10
    np.testing.assert_array_equal(low, -high)


def test_entropy_against_the_definition():
    """Kullback-Leibler divergence of a histogram, worked out by hand: of the bins 4 2 | 0 6 three are filled,
    and merged by two they become 3 3 | 0 6.
    """
    counts = np.array([[4, 2, 0, 6]]) / 12
    p, q = np.array([4, 2, 6]) / 12, np.array([3, 3, 6]) / 12
    np.testing.assert_allclose(ranges._divergence(counts, 4, 2), [(p * np.log(p / q)).sum()], rtol=1e-9)
    # cut after two bins, the rest is added to the second one, where the quantized histogram has 4 2
    p, q = np.array([4, 8]) / 12, np.array([4, 2]) / 6
    np.testing.assert_allclose(ranges._divergence(counts, 2, 2), [(p * np.log(p / q)).sum()], rtol=1e-9)


def test_cross_entropy_keeps_the_probabilities_better_than_squared_error():
    logits = normal(64, 1000) * 2
    logits[np.arange(64), np.arange(64)] += 12

    def loss(low: np.ndarray, high: np.ndarray) -> float:
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        q = ranges.rounded(logits, low, high, 4, False)
        return float((p * (np.log(np.exp(q).sum(axis=1, keepdims=True)) - q)).sum())

    ours = loss(*ranges.cross_entropy(logits, 4, False))
    assert ours <= loss(*ranges.minmax(logits.reshape(1, -1), 4, False))
    assert ours < loss(*ranges.mse(logits.reshape(1, -1), 4, False))


@pytest.mark.parametrize("rule", [*RULES.values(), ranges.cross_entropy])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equal_values(rule, symmetric):
    for value in (0, 3, -3):
        w = np.full((2, 64), value, np.float32)
        low, high = rule(w, 8, symmetric)
        np.testing.assert_allclose(ranges.rounded(w, low, high, 8, symmetric), w, rtol=0.01)


# ---- grids


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["tensor", "row", 64, 32])
@pytest.mark.parametrize("bits", BITS)
def test_grids_come_back_from_their_tensor(bits, per, symmetric):
    w = normal(6, 128)
    grid = formats.fit(f"i{bits}", w, symmetric=symmetric, per=per)
    codes = encode(w, grid)
    tensor = formats.pack(f"i{bits}", codes, grid)
    stored_codes, stored = formats.unpack(tensor)
    np.testing.assert_array_equal(stored_codes, codes)
    np.testing.assert_array_equal(decode(stored_codes, stored), decode(codes, grid))
    groups = 1 if isinstance(per, str) else 128 // per
    assert tensor.parts["scale"].shape == (6, groups)
    assert ("zero" in tensor.parts) == (not symmetric)
    if per == "tensor":
        assert np.ptp(grid.scale) == 0
    # rounding moves nothing by more than half a step, and the grid has zero itself
    step = np.repeat(grid.scale, 128 // groups, axis=1)
    assert (np.abs(decode(codes, grid) - w) <= step * 0.5001).all()
    assert not decode(encode(np.zeros_like(w), grid), grid).any()


@pytest.mark.parametrize("bits", BITS)
def test_smaller_groups_have_less_error(bits):
    w = np.random.default_rng(0).standard_t(4, (16, 512)).astype(np.float32)
    errors = []
    for per in ("tensor", "row", 128, 32):
        grid = uniform.fit(w, bits, per=per)
        errors.append(((decode(encode(w, grid), grid) - w) ** 2).sum())
    assert sorted(errors, reverse=True) == errors


@pytest.mark.parametrize("rule", RULES)
def test_rules_as_options_of_a_format(rule):
    w = normal(4, 128)
    grid = formats.get("i4").fit(w, choose=RULES[rule], per=64)
    low, high = RULES[rule](w.reshape(-1, 64), 4, True)
    scale = ranges.grid_parameters(low, high, 4, True)[0].astype(np.float16)
    np.testing.assert_array_equal(grid.scale.reshape(-1, 1), scale)
    half = partial(ranges.percentile, percent=50)
    assert (formats.get("i4").fit(w, choose=half).scale < formats.get("i4").fit(w).scale).all()


def test_broken_groups_are_refused():
    with pytest.raises(ValueError, match="100 columns are no whole groups of 64"):
        uniform.fit(normal(2, 100), 4, per=64)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_binary_scales_have_the_least_error(seed):
    w = normal(4, 64, seed)
    grid = binary.fit(w)
    least = ((decode(encode(w, grid), grid) - w) ** 2).sum()
    for factor in (np.float32(0.98), np.float32(1.02)):
        other = grid._replace(scale=grid.scale * factor, offset=grid.offset * factor)
        assert least < ((decode(encode(w, other), other) - w) ** 2).sum()


@pytest.mark.parametrize("module", [binary, ternary])
def test_groups_of_binary_and_ternary_weights(module):
    w = normal(3, 96)
    grid = module.fit(w, group=32)
    assert grid.scale.shape == (3, 3)
    alone = module.fit(w[:, 32:64])
    np.testing.assert_array_equal(grid.scale[:, 1:2], alone.scale)
    assert ternary.threshold(w, group=32)[1].scale.shape == (3, 3)


@pytest.mark.parametrize("name", ["binary", "ternary", "i1", "i2", "i3", "i4", "i8"])
def test_they_run(name):
    """In both backends, the compiled one on prepared lanes."""
    w, x = normal(24, 128, 1), normal(2, 128, 2)
    tensor = formats.quantize(name, w)
    assert np.array_equal(lanes.decode(lanes.prepare([tensor])), formats.dequantize(tensor))
    exact, fast = (kernels.backend(b).linear([tensor])(x) for b in ("numpy", "numba"))
    atol = 2e-2 if name == "ternary" else 2e-3  # of ternary weights' activations eight bits are kept
    np.testing.assert_allclose(fast, exact, atol=atol * np.abs(exact).max())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_run(bits):
    w, x = normal(24, 128, 1), normal(2, 128, 2)
    grid = formats.fit(f"i{bits}", w, symmetric=False, per=32)
    tensor = formats.pack(f"i{bits}", encode(w, grid), grid)
    exact, fast = (kernels.backend(b).linear([tensor])(x) for b in ("numpy", "numba"))
    np.testing.assert_allclose(fast, exact, atol=2e-3 * np.abs(exact).max())
