"""HQQ: against the published four statements in their zero-point form, and by what it promises."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq import formats
from edgeq.grid import decode, encode
from edgeq.powers import power
from edgeq.quantizers import hqq as room
from edgeq.quantizers.hqq import AUTHORS, Solver, Store, grouped, hqq, hqq_onto, ungrouped

OFFSETS = [n for n in formats.names() if (s := getattr(formats.get(n), "SPACE", None)) and s.offset]
OFFSETS += ["i8-g64-asym", "i4-g64-asym", "i3-g64-asym", "i2-g32-asym", "i1-g32-asym"]


def weights(rows=24, cols=512, seed=0):
    """Weights of which a few are large."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (rows, cols)) * 0.05).astype(np.float32)


def published(w, bits, group, axis, p=0.7, beta=10.0, kappa=1.01, rounds=20):
    """The method with zero points and the inverse of the scale, float64, and what it leaves of |W - Ŵ|."""
    x = grouped(w.astype(np.float64), group, axis)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    scale = (2**bits - 1) / (high - low)
    zero, best, found = -low * scale, np.inf, None
    for _ in range(rounds):
        q = np.clip(np.round(x * scale + zero), 0, 2**bits - 1)
        r = (q - zero) / scale
        e = np.abs(x - r)
        if e.mean() >= best:
            break
        best, found = e.mean(), r
        with np.errstate(divide="ignore"):
            w_e = np.sign(x - r) * np.maximum(e - e ** (p - 1) / beta, 0)
        zero = (q - (x - w_e) * scale).mean(1, keepdims=True)
        beta *= kappa
    return ungrouped(found, w.shape, axis)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [1, 20])  # the method's β means something else for larger weights
def test_the_published_statements_find_no_better(bits, axis, scale):
    w = weights() * np.float32(scale)
    codes, grid = hqq(w, bits=bits, axis=axis)
    ours, theirs = ungrouped(decode(codes, grid), w.shape, axis), published(w, bits, 64, axis)

    def lost(coded):
        return (np.abs(w - coded) ** 0.7).sum()

    assert lost(ours) <= lost(theirs) * (1 + 1e-5)
    assert lost(ours) > lost(theirs) * 0.95
    assert codes.max() == 2**bits - 1


@pytest.mark.parametrize("name", OFFSETS)
def test_no_round_makes_it_worse(name):
    w = weights()
    lost = []
    for rounds in range(0, 21, 4):
        codes, grid = hqq_onto(name, w, solver=AUTHORS._replace(rounds=rounds))
        lost.append((np.abs(w - decode(codes, grid)) ** np.float64(0.7)).sum())
    assert (np.diff(lost) <= 1e-6 * lost[0]).all()  # sums are float32
    assert lost[-1] < lost[0]


@pytest.mark.parametrize("name", OFFSETS)
def test_files_hold_all_of_it(name):
    w = weights()
    codes, grid = hqq_onto(name, w)
    np.testing.assert_array_equal(codes, encode(w, grid))
    np.testing.assert_array_equal(formats.dequantize(formats.pack(name, codes, grid)), decode(codes, grid))


def test_groups_of_both_axes_by_hand():
    w = np.arange(24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(grouped(w, 3, 1)[:2], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(grouped(w, 4, 0)[:2], [[0, 6, 12, 18], [1, 7, 13, 19]])
    np.testing.assert_array_equal(grouped(w, 2, 0)[:2], [[0, 12], [1, 13]])
    for axis in (0, 1):
        np.testing.assert_array_equal(ungrouped(grouped(w, 2, axis), w.shape, axis), w)


@pytest.mark.parametrize("name", OFFSETS)
def test_blocks_of_one_value(name):
    for value in (0, 1, -1, 1e-30):
        w = np.full((2, 256), value, np.float32)
        np.testing.assert_allclose(decode(*hqq_onto(name, w)), w, rtol=0.02, atol=1e-7)
    codes, grid = hqq(np.full((2, 64), 0.3, np.float32))
    np.testing.assert_array_equal(decode(codes, grid), np.full((2, 64), 0.3, np.float32))


def test_a_far_weight_does_not_move_the_others():
    """What the exponent is for: with squares the offset would follow the far one."""
    w = np.tile(np.linspace(-1, 1, 63, dtype=np.float32), (1, 1))
    w = np.append(w, np.float32(40))[None]
    x = w[:, :-1]
    begin = np.float32([-1.05]), np.float32([2 / 15])
    offsets = [
        room.solve(w, begin[1], begin[0], np.arange(16), Store(), Solver(beta=beta, rounds=1))
        for beta in (10.0, 1e-6)  # the second takes all for noise, and makes squares small
    ]
    near = [
        np.abs(x - decode(encode(x, g), g)).mean()
        for g in (room.Grid(np.arange(16), begin[1][:, None], o[:, None]) for o in offsets)
    ]
    assert near[0] < 0.1
    assert near[0] <= near[1]


@given(
    name=st.sampled_from([None, *OFFSETS]),
    kind=st.sampled_from(["normal", "zero", "equal", "large", "small", "far"]),
    rows=st.integers(1, 40),
    p=st.sampled_from([0.5, 0.7, 0.95]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_compiled_it_finds_the_same(name, kind, rows, p, seed):
    w = {
        "normal": weights(rows, 256, seed),
        "zero": np.zeros((rows, 256), np.float32),
        "equal": np.full((rows, 256), -0.7, np.float32),
        "large": weights(rows, 256, seed) * np.float32(1e4),
        "small": weights(rows, 256, seed) * np.float32(1e-7),
        "far": weights(rows, 256, seed) + np.float32(3),
    }[kind]
    solver = AUTHORS._replace(p=p)
    onto = partial(hqq, w) if name is None else partial(hqq_onto, name, w)
    (codes, grid), (fast_codes, fast_grid) = onto(solver=solver, compiled=False), onto(solver=solver)
    np.testing.assert_array_equal(codes, fast_codes)
    for ours, fast in zip(grid, fast_grid, strict=True):
        assert ours is fast is None or ours.tobytes() == fast.tobytes()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7, 0.99])
def test_powers(p):
    rng = np.random.default_rng(0)
    x = (10.0 ** rng.uniform(-30, 30, 10000)).astype(np.float32)
    np.testing.assert_allclose(power(x, p), x.astype(np.float64) ** p, rtol=1e-5)
    near = rng.uniform(1e-4, 4, 10000).astype(np.float32)
    np.testing.assert_allclose(power(near, p), near.astype(np.float64) ** p, rtol=1e-6)
    assert 0 < power(np.zeros(1, np.float32), p)[0] < 1e-3


def test_unsound_input():
    with pytest.raises(ValueError, match="p = 1, expected a number between 0 and 1"):
        hqq(weights(), solver=Solver(p=1))
    with pytest.raises(ValueError, match="no whole groups of 48 along axis 1"):
        hqq(weights(2, 64), group=48)
    with pytest.raises(ValueError, match="no finite numbers"):
        hqq(weights() * np.float32(np.inf))
    with pytest.raises(ValueError, match="q4_0 has no offsets"):
        hqq_onto("q4_0", weights())
    with pytest.raises(ValueError, match="500 columns, q4_k needs a multiple of 256"):
        hqq_onto("q4_k", weights(2, 500))
